"""The spectral VAE: fit its linear coding on a corpus, then train the corrections (P 3.4).

Run: python -m duotok.recipes.renderer.train_spectral_vae \\
         recipes/renderer/train_spectral_vae/small.yaml --out runs/small/vae --minutes 20
"""

import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn

from duotok.recipes.renderer.vae_excerpts import ExcerptConfig, draw_excerpt, read_items
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.spectrum import band_filters
from duotok.tokenizer.common.errors import ConfigError, DataError

SMALLEST_DEVIATION = 1e-3  # of a latent, so that silence does not become noise
_LARGEST_GAIN = 2.0  # of a magnitude
# Of the middle's missing decibels. What is lost is lost from peaks: the whole of it would bring the loudness
# back exactly, but make everything between the peaks too loud (log10-mel L1 0.171 against 0.163 at a half).
_MID_SHARE = 2 / 3
_FINE_BANDS_HZ = ((50, 300), (300, 1000), (1000, 3000))
_PITCH_BAND_HZ = (50, 5000)
_LOG_FLOOR = 1e-3
_ENERGY_EXCERPTS = 150  # at most, for the energy gains of the finished VAE


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
        for name, value in vars(self).items():
            if value < 0:
                raise ConfigError(f"loss.{name} must not be negative, got {value}")


@dataclass(frozen=True, kw_only=True)
class DataConfig(ExcerptConfig):
    """Which sound is heard, and how much of it the linear coding is fitted to."""

    fit_excerpts: int = 600

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_excerpts < 1:
            raise ConfigError(f"data.fit_excerpts must be at least 1, got {self.fit_excerpts}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: DataConfig
    model: SpectralVAEConfig = field(default_factory=SpectralVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Fit the linear coding; make the objective and its batches."""
    items = read_items(config.data)

    def fit_waves(count: int) -> Iterator[Tensor]:
        for number in range(count):
            rng = np.random.default_rng((config.train.seed, number, 1))
            yield draw_excerpt(rng, items, config.data)

    vae = SpectralVAE(config.model)
    fit_linear(vae, fit_waves(config.data.fit_excerpts))
    objective = VAEObjective(vae, config.loss)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        waves = [draw_excerpt(rng, items, config.data) for _ in range(config.train.batch_size)]
        return {"wave": torch.stack(waves)}

    def export(folder: Path) -> None:
        fit_energy_gains(vae.eval(), fit_waves(min(_ENERGY_EXCERPTS, config.data.fit_excerpts)))
        vae.save_pretrained(folder)

    return Task(objective, make_batch, export)


class VAEObjective(nn.Module):
    """Losses between the spectra of a wave and those decoded from its noisy latents."""

    feature_deviation: Tensor
    level_weight: Tensor

    def __init__(self, vae: SpectralVAE, config: VAELossConfig) -> None:
        super().__init__()
        self.vae, self.config = vae, config
        frequencies = vae.features.pooled.frequencies_hz()
        self.fine_bands = [_band(frequencies, low, high) for low, high in _FINE_BANDS_HZ]
        self.pitch_band = _band(frequencies, *_PITCH_BAND_HZ)
        weight = vae.feature_weight[: vae.features.mid_dim].square()
        self.register_buffer("level_weight", weight / weight.mean(), persistent=False)
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
        stereo = (found - target)[..., vae.features.mid_dim :].abs().mean()
        statistics = rearrange(latents.float(), "batch dim frames -> dim (batch frames)")
        latent = statistics.mean(dim=1).square().mean() + (statistics.var(dim=1) - 1).square().mean()
        losses = {"feature": error.square().mean(), "level": level, "fine": fine}
        losses |= {"pitch": pitch, "stereo": stereo, "latent": latent}
        total = sum((getattr(self.config, name) * value for name, value in losses.items()), torch.zeros(()))
        return {"total": total, **losses}


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


class Moments:
    """Mean and covariance of vectors that come in pieces, in float64."""

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.sum = torch.zeros(dim, dtype=torch.float64)
        self.products = torch.zeros(dim, dim, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """values [count, dim]."""
        self.count += len(values)
        self.sum += values.sum(dim=0, dtype=torch.float64)
        self.products += (values.T @ values).double()

    def mean(self) -> Tensor:
        return self.sum / self.count

    def covariance(self) -> Tensor:
        mean = self.mean()
        return self.products / self.count - torch.outer(mean, mean)


@torch.no_grad()
def fit_linear(vae: SpectralVAE, waves: Iterable[Tensor]) -> None:
    """Fit the VAE's linear coding: the principal components of the features of waves [2, samples]."""
    dims = [vae.features.mid_dim, vae.features.side_dim]
    moments = [Moments(dim) for dim in dims]
    for wave in waves:
        weighted = vae.features(wave[None])[0] * vae.feature_weight
        for part, values in zip(moments, weighted.split(dims, dim=-1), strict=True):
            part.add(values)
    if moments[0].count < 2:
        raise DataError("no audio to fit the linear coding on; check the manifest")
    mid_basis, mid_scale = principal_components(moments[0].covariance(), vae.config.mid_latents)
    side_basis, side_scale = principal_components(moments[1].covariance(), vae.config.side_latents)
    mean = torch.cat([part.mean() for part in moments]).float() / vae.feature_weight
    vae.set_linear(
        mean=mean, mid_basis=mid_basis, side_basis=side_basis, scale=torch.cat([mid_scale, side_scale])
    )


def principal_components(covariance: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the first components [dim, count], largest entry positive, and their deviations [count]."""
    values, vectors = torch.linalg.eigh(covariance)
    values, vectors = values.flip(0)[:count], vectors.flip(1)[:, :count]
    largest = vectors.gather(0, vectors.abs().argmax(dim=0, keepdim=True))
    deviations = values.clamp_min(SMALLEST_DEVIATION**2).sqrt()
    return (vectors * largest.sign()).float(), deviations.float()


@torch.no_grad()
def fit_energy_gains(vae: SpectralVAE, waves: Iterable[Tensor]) -> None:
    """Set the gains so that waves [2, samples] keep the energy of each band: side all, mid in part."""
    features = vae.features
    filters = band_filters(features.pooled.frequencies_hz(), features.bands).to(features.band_filters)
    vae.feature_gain.fill_(1)
    sums = torch.zeros(4, features.bands, dtype=torch.float64)  # mid, found mid, side, found side
    for wave in waves:
        target = features(wave[None].to(vae.feature_gain))[0]
        found = vae.decode_features(vae.encode_features(target[None]))[0]
        power, found_power = (features.magnitudes(values).square() @ filters for values in (target, found))
        width, found_width = (
            with_mid.square() + beside.clamp_min(0).square()  # as side_spectrum does
            for with_mid, beside in (x[:, features.mid_dim :].chunk(2, dim=-1) for x in (target, found))
        )
        energies = torch.stack([power, found_power, power * width, power * found_width]).sum(dim=1)
        energies = energies.double().cpu()
        if energies[0].sum() > 0:
            sums += energies / energies[0].sum()
    if not sums[0].sum() > 0:
        raise DataError("only silence to fit energy gains on; check the manifest")
    mid, side = ((sums[i] + 1e-9) / (sums[i + 1] + 1e-9) for i in (0, 2))
    mid_gain, side_gain = (x.sqrt().clamp(1 / _LARGEST_GAIN, _LARGEST_GAIN).to(filters) for x in (mid, side))
    vae.feature_gain[: features.mid_dim] = (filters @ mid_gain).pow(_MID_SHARE * features.power)
    vae.feature_gain[features.mid_dim :] = side_gain.repeat(2)


main = recipe_main("Spectral VAE", Config, build)

if __name__ == "__main__":
    sys.exit(main())
