"""An acoustic codec on the VAE's latents: residual vector quantization, with a little network on both sides.

It lies beside the VAE, which it contains, and not beside the tokenizer, whose room imports no other: what a
language model needs of it is `tokenizer.acoustic_codec`. With the VAE inside, its folder is all that turns
codes into sound, and one fingerprint names both.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.acoustic_codec import AcousticCodec
from ..tokenizer.common.checkpoint import open_component
from ..tokenizer.common.chunks import join_chunks
from ..tokenizer.common.config import config_from_dict
from ..tokenizer.common.errors import ConfigError
from ..tokenizer.common.files import read_json_mapping
from ..tokenizer.published_codecs import PublishedCodec
from ..tokenizer.quantizers import RESIDUAL_QUANTIZERS, ResidualQuantizer
from .autoencoder import Autoencoder
from .spectral_vae import ResidualBranch, SpectralVAE
from .waveform_vae import OobleckVAE

VAES: dict[str, type[Autoencoder]] = {cls.KIND: cls for cls in (SpectralVAE, OobleckVAE)}
CHUNK_FRAMES = 1500


@dataclass(frozen=True, kw_only=True)
class LatentCodecConfig:
    """Settings of the codec; the defaults are the base size (seed of HCodec: 16 levels of 1,024)."""

    levels: int = 16
    codebook_size: int = 1024
    latents_per_frame: int = 1  # latent frames that one frame of codes stands for: 1 = 50 Hz, 2 = 25 Hz
    quantizer: str = "moving_average"  # or simvq
    blocks: int = 4  # ConvNeXt blocks on each side of the codes; 0 = none
    dim: int = 512  # their width
    kernel_frames: int = 7
    vae_kind: str = SpectralVAE.KIND
    vae: dict[str, Any] = field(default_factory=dict)  # settings of the VAE inside

    def __post_init__(self) -> None:
        for name, low, high in (
            ("levels", 1, 64),
            ("codebook_size", 2, 2**16),
            ("latents_per_frame", 1, 8),
            ("blocks", 0, 64),
            ("dim", 1, 2**14),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise ConfigError(f"{name} must be from {low} to {high}, got {value}")
        if self.quantizer not in RESIDUAL_QUANTIZERS:
            known = ", ".join(RESIDUAL_QUANTIZERS)
            raise ConfigError(f"quantizer must be one of {known}, got {self.quantizer!r}")
        if self.vae_kind not in VAES:
            raise ConfigError(f"vae_kind must be one of {', '.join(VAES)}, got {self.vae_kind!r}")
        if self.kernel_frames % 2 != 1:
            raise ConfigError(f"kernel_frames must be odd, got {self.kernel_frames}")


class LatentCodec(AcousticCodec[LatentCodecConfig]):
    """Latents, weighted -> correction -> residual codes -> correction -> latents -> sound."""

    KIND = "latent_codec"
    CONFIG = LatentCodecConfig
    STORED = ("vae_fingerprint",)

    latent_mean: Tensor
    latent_weight: Tensor

    def __init__(self, config: LatentCodecConfig) -> None:
        super().__init__(config)
        make = VAES[config.vae_kind]
        self.vae = make(config_from_dict(make.CONFIG, config.vae, "vae"))
        self.vae_fingerprint: str | None = None  # of the VAE's own folder: latents of it train this codec
        self.frame_rate_hz = self.vae.latent_rate_hz / config.latents_per_frame
        self.codebooks, self.codebook_size = config.levels, config.codebook_size
        dim = self.vae.latent_dim * config.latents_per_frame
        # Errors count by what they change in the sound: latents are weighted before they are quantized.
        self.register_buffer("latent_mean", torch.zeros(self.vae.latent_dim))
        self.register_buffer("latent_weight", torch.ones(self.vae.latent_dim))
        self.quantizer = ResidualQuantizer(config.levels, config.codebook_size, dim, config.quantizer)

        def correct() -> ResidualBranch | None:
            shape = {"dim": config.dim, "blocks": config.blocks, "kernel_frames": config.kernel_frames}
            return ResidualBranch(dim, dim, **shape) if config.blocks else None

        self.encoder, self.decoder = correct(), correct()

    @classmethod
    def on_vae(cls, vae: Autoencoder, **settings: Any) -> "LatentCodec":
        """Return an untrained codec with these settings (see LatentCodecConfig) and a copy of the VAE."""
        config = LatentCodecConfig(vae_kind=vae.KIND, vae=asdict(vae.config), **settings)
        codec = cls(config)
        codec.vae.load_state_dict(vae.state_dict())
        codec.vae_fingerprint = vae.known_as
        return codec

    def train(self, mode: bool = True) -> "LatentCodec":
        """Set the mode; the frozen VAE stays in eval mode."""
        super().train(mode)
        self.vae.eval()
        return self

    def to_features(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, latent frames] -> weighted [batch, frames, dim]; whole frames only."""
        weighted = (latents.transpose(1, 2) - self.latent_mean) * self.latent_weight
        return weighted.unflatten(1, (-1, self.config.latents_per_frame)).flatten(2)

    def to_latents(self, features: Tensor) -> Tensor:
        """Undo `to_features`."""
        weighted = features.unflatten(2, (self.config.latents_per_frame, -1)).flatten(1, 2)
        return (weighted / self.latent_weight + self.latent_mean).transpose(1, 2)

    def enter(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> what is quantized, of the same shape."""
        return features if self.encoder is None else features + self.encoder(features)

    def leave(self, vectors: Tensor) -> Tensor:
        """vectors of codes [batch, frames, dim] -> features, of the same shape."""
        return vectors if self.decoder is None else vectors + self.decoder(vectors)

    @torch.no_grad()
    def encode_latents(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, latent frames] -> codes [batch, codebooks, frames that cover them]."""
        missing = -latents.shape[2] % self.config.latents_per_frame
        features = self.to_features(functional.pad(latents, (0, missing), mode="replicate"))
        codes = self._by_chunks(
            features, lambda part: self.quantizer.encode(self.enter(part)).transpose(1, 2), self.encoder
        )
        return codes.transpose(1, 2)

    @torch.no_grad()
    def decode_latents(self, codes: Tensor) -> Tensor:
        """codes [batch, 1..codebooks, frames] -> latents [batch, latent_dim, latent frames]."""
        features = self._by_chunks(
            codes.transpose(1, 2),
            lambda part: self.leave(self.quantizer.decode(part.transpose(1, 2))),
            self.decoder,
        )
        return self.to_latents(features)

    def _by_chunks(self, values: Tensor, compute: Any, branch: nn.Module | None) -> Tensor:
        halo = branch.reach_frames if isinstance(branch, ResidualBranch) else 0
        return join_chunks(
            values.shape[1], lambda low, high: compute(values[:, low:high]), size=CHUNK_FRAMES, halo=halo
        )

    def _encode(self, wave: Tensor) -> Tensor:
        return torch.cat([self.encode_latents(self.vae.encode_song(each)[None]) for each in wave])

    def _decode(self, codes: Tensor, samples: int) -> Tensor:
        latents = self.decode_latents(codes)
        return torch.stack([self.vae.decode_song(each, samples) for each in latents]).to(codes.device)


def open_codec(source: str | Path) -> AcousticCodec[Any]:
    """Read a codec (CPU, eval): a folder of ours, by the kind in its config.json, or a published codec.

    source: a codec's folder, or a folder or hub id of transformers. Raises CheckpointError or ConfigError
    where it is damaged or none.
    """
    description = Path(source) / "config.json"
    if description.is_file() and "model_type" in read_json_mapping(description, "codec folder"):
        return PublishedCodec.from_hub(str(source))
    if Path(source).exists() or str(source).startswith((".", "/")):
        return open_component(source, (LatentCodec, PublishedCodec))
    return PublishedCodec.from_hub(str(source))
