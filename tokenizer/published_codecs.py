"""Published codecs as acoustic codecs: EnCodec, DAC and Mimi, by `transformers`, from a folder or a hub id.

EnCodec: Defossez et al. 2022, arXiv 2210.13438; DAC: Kumar et al. 2023, arXiv 2306.06546; Mimi: Defossez et
al. 2024, arXiv 2410.00037. Their own rate and channels stay inside; a mono codec gives both channels alike.
"""

import json
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .acoustic_codec import AcousticCodec
from .common.audio import SAMPLE_RATE_HZ, resample
from .common.checkpoint import fingerprint_of
from .common.chunks import join_chunks
from .common.errors import ConfigError

CLASSES = {"encodec": "Encodec", "dac": "Dac", "mimi": "Mimi"}  # by model_type in their config.json
CHUNK_SECONDS = 60
HALO_SECONDS = 12  # seen on both sides of a chunk; Mimi's attention looks 10 s back


@dataclass(frozen=True, kw_only=True)
class PublishedCodecConfig:
    """What builds a published codec."""

    architecture: str  # encodec, dac or mimi
    codebooks: int  # the first ones, that are used; each codec has more of them for higher rates
    model: dict[str, Any]  # its transformers config

    def __post_init__(self) -> None:
        if self.architecture not in CLASSES:
            raise ConfigError(
                f"architecture must be one of {', '.join(CLASSES)}, got {self.architecture!r:.40}; other "
                "codecs are not known here"
            )


class PublishedCodec(AcousticCodec[PublishedCodecConfig]):
    """A codec of `transformers`; saved as any component, it needs no hub any more."""

    KIND = "published_codec"
    CONFIG = PublishedCodecConfig

    def __init__(self, config: PublishedCodecConfig) -> None:
        super().__init__(config)
        import transformers

        name = CLASSES[config.architecture]
        settings = getattr(transformers, f"{name}Config").from_dict(config.model)
        self.model: nn.Module = getattr(transformers, f"{name}Model")(settings)
        most = settings.n_codebooks if config.architecture == "dac" else settings.num_quantizers
        least = settings.num_semantic_quantizers if config.architecture == "mimi" else 1
        if not least <= config.codebooks <= most:
            raise ConfigError(
                f"this {name} has {least} to {most} codebooks, not {config.codebooks}; give another number"
            )
        if getattr(settings, "normalize", False) or getattr(settings, "chunk_length_s", None):
            raise ConfigError(
                "this EnCodec keeps a scale of each second beside its codes, which codes alone cannot tell; "
                "give facebook/encodec_24khz or facebook/encodec_32khz"
            )
        self.sample_rate_hz = int(settings.sampling_rate)
        # Mimi's frames are halves of what its convolutions give, which its config tells as a rate.
        is_mimi = config.architecture == "mimi"
        self.hop_samples = (
            round(self.sample_rate_hz / settings.frame_rate) if is_mimi else int(settings.hop_length)
        )
        self.frame_rate_hz = self.sample_rate_hz / self.hop_samples
        self.channels = int(getattr(settings, "audio_channels", 1))
        self.codebooks, self.codebook_size = config.codebooks, int(settings.codebook_size)

    @classmethod
    def from_hub(cls, source: str, codebooks: int | None = None) -> "PublishedCodec":
        """Read a transformers folder or hub id (CPU, eval); safetensors only.

        codebooks: how many of the first ones are used; 8 or, where there are fewer, all by default.
        """
        import transformers
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        try:
            settings = transformers.AutoConfig.from_pretrained(source)
            if settings.model_type not in CLASSES:
                raise ConfigError(f"{source} holds a {settings.model_type}, not {', '.join(CLASSES)}")
            make = getattr(transformers, f"{CLASSES[settings.model_type]}Model")
            model = make.from_pretrained(source, use_safetensors=True, torch_dtype=torch.float32)
        except (OSError, ValueError, KeyError, RuntimeError, HfHubHTTPError, HFValidationError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ConfigError(
                f"cannot load the codec {source}: {reason}; give a folder of transformers or a hub id"
            ) from error
        most = getattr(settings, "n_codebooks", None) or settings.num_quantizers
        described = json.loads(settings.to_json_string(use_diff=False))
        codec = cls(
            PublishedCodecConfig(
                architecture=settings.model_type, codebooks=codebooks or min(8, most), model=described
            )
        )
        codec.model.load_state_dict(model.state_dict())
        codec.fingerprint = fingerprint_of(codec.state_dict())
        return codec.eval()

    def _encode(self, wave: Tensor) -> Tensor:
        frames, hop = self.frames(wave.shape[-1]), self.hop_samples
        if self.channels == 1:
            wave = wave.mean(dim=1, keepdim=True)
        wave = resample(wave, SAMPLE_RATE_HZ, self.sample_rate_hz, frames * hop)

        def encode_chunk(low: int, high: int) -> Tensor:
            codes = self._encode_chunk(wave[..., low * hop : high * hop])[:, : self.codebooks]
            return rearrange(codes, "batch codebooks frames -> batch frames codebooks")

        return join_chunks(frames, encode_chunk, **self._chunks()).transpose(1, 2)

    def _decode(self, codes: Tensor, samples: int) -> Tensor:
        hop = self.hop_samples

        def decode_chunk(low: int, high: int) -> Tensor:
            wave = self._decode_chunk(codes[..., low:high])
            missing = (high - low) * hop - wave.shape[-1]  # DAC's strides may leave out a few
            return nn.functional.pad(wave, (0, missing)).transpose(1, 2)

        wave = join_chunks(codes.shape[-1], decode_chunk, rate=hop, **self._chunks()).transpose(1, 2)
        wave = resample(wave, self.sample_rate_hz, SAMPLE_RATE_HZ, samples)
        return wave.expand(-1, 2, -1).contiguous()

    def _chunks(self) -> dict[str, int]:
        return {
            "size": round(CHUNK_SECONDS * self.frame_rate_hz),
            "halo": round(HALO_SECONDS * self.frame_rate_hz),
        }

    def _encode_chunk(self, wave: Tensor) -> Tensor:
        """wave [batch, channels, frames * hop] at its rate -> codes [batch, codebooks or more, frames]."""
        model: Any = self.model
        if self.config.architecture == "encodec":
            return model.encode(wave, bandwidth=model.config.target_bandwidths[-1]).audio_codes[0]
        if self.config.architecture == "dac":
            return model.encode(wave, n_quantizers=self.codebooks).audio_codes
        return model.encode(wave, num_quantizers=self.codebooks).audio_codes

    def _decode_chunk(self, codes: Tensor) -> Tensor:
        """codes [batch, codebooks, frames] -> wave [batch, channels, about frames * hop] at its rate."""
        model: Any = self.model
        if self.config.architecture == "encodec":
            return model.decode(codes[None], [None]).audio_values
        if self.config.architecture == "dac":
            return model.decode(audio_codes=codes).audio_values[:, None]
        return model.decode(codes).audio_values
