"""The waveform autoencoder of Stable Audio (Oobleck) behind the renderer's interface, by diffusers."""

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, prod

import torch
from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from torch import Tensor
from torch.nn import functional

from ..tokenizer.common.audio import SAMPLE_RATE_HZ
from ..tokenizer.common.component import Component
from ..tokenizer.common.errors import ConfigError
from .resampling import resample
from .vae_transformer import LatentTransformer

SMALLEST_DEVIATION = 1e-4
CHUNK_FRAMES = 250  # of the convolutions at a time: 5 s at 50 Hz
WINDOW_SECONDS = 30.0  # of the transformer at a time
OVERLAP_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True)
class OobleckVAEConfig:
    """Settings: by default the paper's rates (48 kHz, 50 Hz, 64 latents; P 3.4), Stable Audio's width."""

    sample_rate_hz: int = 48_000  # of the network; the interface stays at 48 kHz
    latent_dim: int = 64
    decoder_width: int = 128
    strides: tuple[int, ...] = (2, 4, 4, 5, 6)  # their product is the hop
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)
    transformer_blocks: int = 0  # over the latents, before the decoder
    head_dim: int = 64  # of the transformer

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.channel_multiples) or not self.strides:
            raise ConfigError("strides and channel_multiples must have the same number of entries")
        if min(self.strides) < 2 or min(self.channel_multiples) < 1:
            raise ConfigError(
                f"strides must be at least 2 and channel_multiples at least 1, got {self.strides} and "
                f"{self.channel_multiples}"
            )
        for name in ("sample_rate_hz", "latent_dim", "decoder_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.transformer_blocks < 0:
            raise ConfigError(f"transformer_blocks must not be negative, got {self.transformer_blocks}")
        if self.transformer_blocks and (
            self.head_dim < 4 or self.head_dim % 4 or self.latent_dim % self.head_dim
        ):
            raise ConfigError(
                f"head_dim must be a multiple of 4 that divides latent_dim {self.latent_dim}, "
                f"got {self.head_dim}"
            )


class OobleckVAE(Component[OobleckVAEConfig]):
    """48 kHz stereo <-> latents by strided convolutions (Evans et al. 2024); the latents are the means.

    A network of another rate hears and gives the wave resampled; no gradients pass there.
    """

    KIND = "oobleck_vae"
    CONFIG = OobleckVAEConfig

    def __init__(self, config: OobleckVAEConfig) -> None:
        super().__init__(config)
        self.latent_dim = config.latent_dim
        self.hop_samples = prod(config.strides)  # at the network's own rate
        self.latent_rate_hz = config.sample_rate_hz / self.hop_samples
        self.model = AutoencoderOobleck(
            encoder_hidden_size=2 * config.latent_dim,  # means and deviations
            downsampling_ratios=list(config.strides),
            channel_multiples=list(config.channel_multiples),
            decoder_channels=config.decoder_width,
            decoder_input_channels=config.latent_dim,
            audio_channels=2,
            sampling_rate=config.sample_rate_hz,
        )
        self.transformer = (
            LatentTransformer(
                dim=config.latent_dim, head_dim=config.head_dim, blocks=config.transformer_blocks
            )
            if config.transformer_blocks
            else None
        )

    @property
    def reach_frames(self) -> int:
        """How many frames to each side the decoder's convolutions see from the one that a sample lies in."""
        units = 3 * (1 + 3 + 9)  # kernels of 7, dilated
        past = future = 3
        for stride in self.config.strides:
            past, future, padding = past + units, future + units, ceil(stride / 2)
            past = (past + 2 * stride - 1 - padding) // stride
            future = (future + padding + stride - 1) // stride
        return max(past, future) + 3

    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] at 48 kHz -> latents [batch, latent_dim, frames], the last one padded."""
        return self.encode_distribution(wave)[0]

    def encode_distribution(self, wave: Tensor) -> tuple[Tensor, Tensor]:
        """wave [batch, 2, samples] -> mean and deviation of the latents, [batch, latent_dim, frames] each."""
        if wave.ndim != 3 or wave.shape[1] != 2 or wave.shape[2] < 1:
            raise ConfigError(f"the VAE needs a wave [batch, 2, samples], got {tuple(wave.shape)}")
        rate_hz = self.config.sample_rate_hz
        if rate_hz != SAMPLE_RATE_HZ:
            own_samples = -(-wave.shape[-1] * rate_hz // SAMPLE_RATE_HZ)
            wave = resample(wave, SAMPLE_RATE_HZ, rate_hz, own_samples)
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.hop_samples))
        mean, scale = self.model.encoder(wave).chunk(2, dim=1)
        return mean, functional.softplus(scale) + SMALLEST_DEVIATION

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, samples]; all frames' samples by default."""
        if latents.ndim != 3 or latents.shape[1] != self.latent_dim or latents.shape[2] < 1:
            raise ConfigError(
                f"the VAE needs latents [batch, {self.latent_dim}, frames], got {tuple(latents.shape)}"
            )
        samples = self._require_samples(latents.shape[-1], samples)
        if self.transformer is not None:
            latents = self.transformer(latents)
        return self._to_interface(self._decode_hops(latents), samples)

    @torch.no_grad()
    def decode_song(
        self, latents: Tensor, samples: int, progress: Callable[[int], None] | None = None
    ) -> Tensor:
        """latents [latent_dim, frames] -> wave [2, samples] on the CPU; progress gets each chunk's frames.

        The convolutions run chunk by chunk, each with all that they see to both sides: the sound of one pass,
        to float rounding, while memory grows with the wave alone. A transformer sees everything at once and
        cannot be cut exactly: beyond 30 s it runs in windows of 30 s whose results are crossfaded over 3 s,
        before the convolutions, so that no two waves are mixed.
        """
        frames, hop = latents.shape[-1], self.hop_samples
        samples = self._require_samples(frames, samples)
        if self.transformer is not None:
            window, overlap = (
                max(1, round(seconds * self.latent_rate_hz)) for seconds in (WINDOW_SECONDS, OVERLAP_SECONDS)
            )
            latents = self.transformer.in_windows(latents[None], window, overlap)[0]
        wave = torch.zeros(2, frames * hop)
        for start in range(0, frames, CHUNK_FRAMES):
            stop = min(frames, start + CHUNK_FRAMES)
            low, high = max(0, start - self.reach_frames), min(frames, stop + self.reach_frames)
            chunk = self._decode_hops(latents[None, :, low:high])[0, :, (start - low) * hop :]
            wave[:, start * hop : stop * hop] = chunk[:, : (stop - start) * hop].cpu()
            if progress is not None:
                progress(stop - start)
        return self._to_interface(wave, samples)

    def _decode_hops(self, latents: Tensor) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, frames * hop_samples] at the own rate."""
        # Odd strides make the transposed convolutions a few samples shorter than a whole number of hops.
        length = latents.shape[-1] * self.hop_samples
        wave = self.model.decoder(latents)
        return functional.pad(wave, (0, max(0, length - wave.shape[-1])))[..., :length]

    def _to_interface(self, wave: Tensor, samples: int) -> Tensor:
        """Wave [..., n] at the own rate -> [..., samples] at 48 kHz."""
        if self.config.sample_rate_hz != SAMPLE_RATE_HZ:
            return resample(wave, self.config.sample_rate_hz, SAMPLE_RATE_HZ, samples)
        return wave[..., :samples]

    def _require_samples(self, frames: int, samples: int | None) -> int:
        """The samples at 48 kHz to give of so many frames."""
        longest = frames * self.hop_samples * SAMPLE_RATE_HZ // self.config.sample_rate_hz
        samples = longest if samples is None else samples
        if not 0 < samples <= longest:
            raise ConfigError(f"{frames} latent frames give 1 to {longest} samples, not {samples}")
        return samples
