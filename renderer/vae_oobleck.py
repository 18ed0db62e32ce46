"""The waveform autoencoder of Stable Audio (Oobleck) behind the renderer's interface, by diffusers."""

from dataclasses import dataclass
from math import prod

from diffusers.models.autoencoders.autoencoder_oobleck import AutoencoderOobleck
from torch import Tensor
from torch.nn import functional

from ..tokenizer.common.component import Component
from ..tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class OobleckVAEConfig:
    """Settings: by default the paper's rates (48 kHz, 50 Hz, 64 latents; P 3.4), Stable Audio's width."""

    sample_rate_hz: int = 48_000
    latent_dim: int = 64
    decoder_width: int = 128
    strides: tuple[int, ...] = (2, 4, 4, 5, 6)  # their product is the hop
    channel_multiples: tuple[int, ...] = (1, 2, 4, 8, 16)

    def __post_init__(self) -> None:
        if len(self.strides) != len(self.channel_multiples) or not self.strides:
            raise ConfigError("strides and channel_multiples must have the same number of entries")
        for name in ("sample_rate_hz", "latent_dim", "decoder_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class OobleckVAE(Component[OobleckVAEConfig]):
    """Stereo wave <-> latents by strided convolutions (Evans et al. 2024); the latents are the means."""

    KIND = "oobleck_vae"
    CONFIG = OobleckVAEConfig

    def __init__(self, config: OobleckVAEConfig) -> None:
        super().__init__(config)
        self.latent_dim = config.latent_dim
        self.hop_samples = prod(config.strides)
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

    def encode(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> latents [batch, latent_dim, ceil(samples / hop_samples)]."""
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.hop_samples))
        mean, _ = self.model.encoder(wave).chunk(2, dim=1)
        return mean

    def decode(self, latents: Tensor, samples: int | None = None) -> Tensor:
        """latents [batch, latent_dim, frames] -> wave [batch, 2, samples]; all frames' samples by default."""
        # Odd strides make the transposed convolutions a few samples shorter than a whole number of hops.
        length = latents.shape[-1] * self.hop_samples
        wave = self.model.decoder(latents)
        wave = functional.pad(wave, (0, max(0, length - wave.shape[-1])))[..., :length]
        return wave if samples is None else wave[..., :samples]
