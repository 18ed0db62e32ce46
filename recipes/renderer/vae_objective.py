"""What the corrections of the spectral VAE learn: spectra with their partials, before any phase is chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from duotok.renderer.stereo import BANDS, band_filters
from duotok.renderer.vae import SpectralVAE
from duotok.tokenizer.common.errors import ConfigError

_FINE_BANDS_HZ = ((50, 300), (300, 1000), (1000, 3000))
_PITCH_BAND_HZ = (50, 5000)
_LOG_FLOOR = 1e-3
_STEREO_BANDS = 32
_STEREO_FLOOR = 1e-2  # power of a silent band


@dataclass(frozen=True, kw_only=True)
class VAELossConfig:
    """Weights of the losses."""

    feature: float = 1.0  # squared error of weighted features, relative to the linear coding's variance
    level: float = 0.3  # absolute error of log10 magnitudes
    fine: float = 0.3  # 1 - correlation of log10 magnitudes within a band and frame
    pitch: float = 0.3  # 1 - correlation of magnitudes: the loud partials
    stereo: float = 1.0  # absolute error of the side against the mid in bands: place and width
    latent: float = 0.01  # keeps latents at mean 0, deviation 1 when the encoder is corrected
    noise: float = 0.05  # deviation of Gaussian noise on the latents, which a diffusion model will produce

    def __post_init__(self) -> None:
        for name in ("feature", "level", "fine", "pitch", "stereo", "latent", "noise"):
            if getattr(self, name) < 0:
                raise ConfigError(f"loss.{name} must not be negative, got {getattr(self, name)}")


class VAEObjective(nn.Module):
    """Losses between the spectra of a wave and those decoded from its noisy latents."""

    feature_deviation: Tensor
    level_weight: Tensor
    stereo_bands: Tensor

    def __init__(self, vae: SpectralVAE, config: VAELossConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        frequencies = vae.features.pooled.frequencies_hz()
        self.fine_bands = [_band(frequencies, low, high) for low, high in _FINE_BANDS_HZ]
        self.pitch_band = _band(frequencies, *_PITCH_BAND_HZ)
        weight = vae.feature_weight[: vae.features.mid_dim].square()
        self.register_buffer("level_weight", weight / weight.mean(), persistent=False)
        self.register_buffer("stereo_bands", band_filters(frequencies, _STEREO_BANDS), persistent=False)
        # Mean variance of a weighted feature, so that the loss is a share of what there is to explain.
        variance = vae.latent_scale.square().sum() / vae.features.dim
        self.register_buffer("feature_deviation", variance.sqrt(), persistent=False)

    def forward(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [batch, 2, samples] -> named losses."""
        vae = self.vae
        with torch.no_grad():
            target = vae.features(wave.float())
        latents = vae.encode_features(target)
        found = vae.decode_features(latents + self.config.noise * torch.randn_like(latents)).float()
        error = (found - target) * vae.feature_weight / self.feature_deviation
        # Magnitudes of the mid [batch, frames, bins]
        wanted, given = vae.features.magnitudes(target), vae.features.magnitudes(found)
        wanted_level, given_level = ((m + _LOG_FLOOR).log10() for m in (wanted, given))
        level = ((given_level - wanted_level).abs() * self.level_weight).mean()
        fine = torch.stack(
            [1 - _correlation(wanted_level[..., band], given_level[..., band]) for band in self.fine_bands]
        ).mean()
        pitch = 1 - _correlation(wanted[..., self.pitch_band], given[..., self.pitch_band])
        stereo = (self._side_gains(found, given) - self._side_gains(target, wanted)).abs().mean()
        statistics = latents.float().transpose(0, 1).flatten(1)  # [latent_dim, batch * frames]
        latent = statistics.mean(dim=1).square().mean() + (statistics.var(dim=1) - 1).square().mean()
        losses = {
            "feature": error.square().mean(),
            "level": level,
            "fine": fine,
            "pitch": pitch,
            "stereo": stereo,
            "latent": latent,
        }
        total = sum((getattr(self.config, name) * value for name, value in losses.items()), torch.zeros(()))
        return {"total": total, **losses}

    def _side_gains(self, features: Tensor, magnitudes: Tensor) -> Tensor:
        """Return what the side is of the mid, in phase and in all or beside: [batch, frames, 2 * bands]."""
        side = features[..., self.vae.features.mid_dim :]
        if self.vae.features.coding == BANDS:
            return side
        compressed, signed = side.chunk(2, dim=-1)
        side = compressed.clamp_min(0).pow(1 / self.vae.features.power)
        coherence = (signed / compressed.clamp_min(0.1)).clamp(-1, 1)
        power = magnitudes.square() @ self.stereo_bands + _STEREO_FLOOR
        in_phase = ((coherence * side * magnitudes) @ self.stereo_bands) / power
        width = ((side.square() @ self.stereo_bands) / power + 1e-4).sqrt()
        return torch.cat([in_phase.clamp(-1.5, 1.5), width.clamp_max(2.0)], dim=-1)


def _band(frequencies: Tensor, low_hz: float, high_hz: float) -> slice:
    inside = torch.nonzero((frequencies >= low_hz) & (frequencies < high_hz)).flatten()
    return slice(int(inside[0]), int(inside[-1]) + 1)


def _correlation(first: Tensor, second: Tensor) -> Tensor:
    """Mean correlation over the last dimension; in silence it is 0, for that has no structure to keep."""
    first = first - first.mean(dim=-1, keepdim=True)
    second = second - second.mean(dim=-1, keepdim=True)
    product = (first * second).sum(dim=-1)
    norms = first.square().sum(dim=-1).add(1e-6).sqrt() * second.square().sum(dim=-1).add(1e-6).sqrt()
    return (product / norms).mean()
