"""The spectral VAE: fit its linear coding on a corpus, then train the corrections (P 3.4).

Run: python -m duotok.recipes.renderer.train_spectral_vae \\
         recipes/renderer/train_spectral_vae/small.yaml --out runs/small/vae --minutes 20
When a diffusion decoder has learned to draw latents, the VAE's decoder learns on against an adversary:
     recipes/renderer/train_spectral_vae/sharper/small.yaml --out runs/small/vae-sharp --minutes 40
"""

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from duotok.recipes.corpus.manifest import Item
from duotok.recipes.renderer.adversary import Judgement, contest
from duotok.recipes.renderer.latents import LatentShards
from duotok.recipes.renderer.vae_excerpts import ExcerptConfig, draw_excerpt, read_cut, read_items
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.spectrum import band_filters
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import HOP_SAMPLES, DuoTokenizer

SMALLEST_DEVIATION = 1e-3  # of a latent, so that silence does not become noise
_LARGEST_GAIN = 2.0  # of a magnitude
# Of the middle's missing decibels. What is lost is lost from peaks: the whole of it would bring the loudness
# back exactly, but make everything between the peaks too loud (log10-mel L1 0.171 against 0.163 at a half).
_MID_SHARE = 2 / 3
_FINE_BANDS_HZ = ((50, 300), (300, 1000), (1000, 3000))
_PITCH_BAND_HZ = (50, 5000)
_LOG_FLOOR = 1e-3
_ENERGY_EXCERPTS = 150  # at most, for the energy gains of the finished VAE
_BAND_EDGES = (0.0, 0.12, 0.35, 0.68, 1.0)  # shares of the features of the middle: 1.5, 4.2, 8.2 kHz of 24
_SLOPE = 0.1


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
    # Folder of latents that a diffusion decoder drew from the codes of items of the manifest. What is decoded
    # from them shall pass for a recording, too; half as many of them are in a batch as excerpts.
    drawn: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fit_excerpts < 1:
            raise ConfigError(f"data.fit_excerpts must be at least 1, got {self.fit_excerpts}")


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """An adversary of the decoder: what latents leave open is then played somehow, and not the mean of it."""

    adversarial: float = 0.0  # weight of the decoder's loss against the discriminators; 0: there are none
    feature_matching: float = 1.0  # the same of the discriminators' activations
    width: int = 16  # channels of a discriminator's layers

    def __post_init__(self) -> None:
        if not (self.adversarial >= 0 and self.feature_matching >= 0 and self.width >= 1):
            raise ConfigError("adversary: weights must not be negative, and width at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: DataConfig
    # A trained VAE whose decoder learns on, in place of a new one as `model` says. Its latents stay as they
    # are, so that what has learned to make them needs to learn nothing new.
    start_from: str | None = None
    model: SpectralVAEConfig = field(default_factory=SpectralVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Fit the linear coding or take over another's; make the objective and its batches."""
    items = read_items(config.data)

    def fit_waves(count: int) -> Iterator[Tensor]:
        for number in range(count):
            rng = np.random.default_rng((config.train.seed, number, 1))
            yield draw_excerpt(rng, items, config.data)

    if config.start_from is None:
        vae = SpectralVAE(config.model)
        fit_linear(vae, fit_waves(config.data.fit_excerpts))
    else:
        vae = open_for_decoder(config.start_from)
    drawn = None if config.data.drawn is None else DrawnLatents(config.data.drawn, items, config.data.seconds)
    if drawn is not None:
        drawn.require(vae, config.adversary)
    objective = VAEObjective(vae, config.loss, config.adversary)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        waves = [draw_excerpt(rng, items, config.data) for _ in range(config.train.batch_size)]
        batch = {"wave": torch.stack(waves)}
        return batch if drawn is None else batch | drawn.make_batch(rng, -(-config.train.batch_size // 2))

    def export(folder: Path) -> None:
        fit_energy_gains(vae.eval(), fit_waves(min(_ENERGY_EXCERPTS, config.data.fit_excerpts)))
        vae.save_pretrained(folder)

    return Task(objective, make_batch, export)


def open_for_decoder(folder: str) -> SpectralVAE:
    """Return a trained VAE of which the decoder alone can learn; ConfigError where it has none."""
    vae = SpectralVAE.from_pretrained(folder)
    if vae.decoder is None:
        raise ConfigError(f"the VAE in {folder} has no decoder that could learn; leave start_from out")
    vae.latents_of = vae.known_as
    vae.feature_gain.fill_(1)  # of the decoder as it was; fitted again to the one that comes out
    vae.requires_grad_(False)
    vae.decoder.requires_grad_(True)
    return vae.train()


class DrawnLatents:
    """Latents that a diffusion decoder drew, with the recordings whose codes it was given."""

    def __init__(self, folder: str, items: Sequence[Item], seconds: float) -> None:
        """seconds: length of a cut, in whole codes (ConfigError).

        DataError where no item of the folder is among these and as long.
        """
        self.shards, self.seconds = LatentShards(folder), seconds
        self.frames = round(seconds * DuoTokenizer.frame_rate_hz)
        if self.frames * HOP_SAMPLES != round(seconds * SAMPLE_RATE_HZ):
            raise ConfigError(f"with data.drawn, data.seconds must be in whole codes of 40 ms, got {seconds}")
        self.items = {item.id: item for item in items if self.shards.frames.get(item.id, 0) >= self.frames}
        if not self.items:
            raise DataError(f"no item of the manifest has {seconds:g} s in {folder}; make its latents first")

    def require(self, vae: SpectralVAE, adversary: AdversaryConfig) -> None:
        """Raise CheckpointError or ConfigError unless they are this VAE's and an adversary judges them."""
        origin = self.shards.origin
        if origin is None or not origin.drawn_by or origin.vae_fingerprint != vae.known_as:
            raise CheckpointError(
                f"{self.shards.folder} holds no latents of the VAE {vae.known_as} that a decoder drew; make "
                f"them by duotok.recipes.renderer.latents --drawn-by"
            )
        if not adversary.adversarial:
            raise ConfigError("data.drawn has no effect without an adversary; set adversary.adversarial")

    def make_batch(self, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """Return "drawn" [count, latent_dim, frames] and the "played" waves [count, 2, samples]."""
        assert self.shards.origin is not None
        track, names = self.shards.origin.track, list(self.items)
        cuts = [self.shards.draw_cut(rng, names, self.frames, 0) for _ in range(count)]
        waves = [
            read_cut(self.items[cut.name], track, cut.start / DuoTokenizer.frame_rate_hz, self.seconds)
            for cut in cuts
        ]
        return {"drawn": torch.stack([cut.latents for cut in cuts]), "played": torch.stack(waves)}


class SpectrumDiscriminators(nn.Module):
    """Judge the middle's spectra, each band by convolutions of its own (as DAC does waves, 2306.06546)."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, vae: SpectralVAE, width: int) -> None:
        super().__init__()
        dim = vae.features.mid_dim
        self.bands = [slice(int(low * dim), int(high * dim)) for low, high in pairwise(_BAND_EDGES)]
        self.stacks = nn.ModuleList(_band_stack(width) for _ in self.bands)
        spread = (vae.mid_basis.square() @ vae.latent_scale[: vae.config.mid_latents].square()).sqrt()
        weight = vae.feature_weight[:dim]
        self.register_buffer("mean", vae.feature_mean[:dim].clone(), persistent=False)
        # Of the mean feature: bins that hardly move in the linear coding are not blown up.
        self.register_buffer("deviation", (spread / weight).mean(), persistent=False)

    def forward(self, features: Tensor) -> list[Judgement]:
        """features [batch, frames, at least mid_dim] -> one judgement per band."""
        spectra = (features[:, None, :, : len(self.mean)] - self.mean) / self.deviation
        judgements = []
        for band, stack in zip(self.bands, self.stacks, strict=True):
            assert isinstance(stack, nn.ModuleList)
            hidden, seen = spectra[..., band], list[Tensor]()
            for layer in stack[:-1]:
                hidden = functional.leaky_relu(layer(hidden), _SLOPE)
                seen.append(hidden)
            judgements.append(Judgement(stack[-1](hidden), seen))
        return judgements


def _band_stack(width: int) -> nn.ModuleList:
    wide = [(1, 1), (width, 2), (width, 2), (width, 2)]  # input channels, stride over bins
    layers = [nn.Conv2d(a, width, (3, 9), stride=(1, stride), padding=(1, 4)) for a, stride in wide]
    return nn.ModuleList(weight_norm(each) for each in (*layers, nn.Conv2d(width, 1, (3, 3), padding=1)))


class VAEObjective(nn.Module):
    """Losses between the spectra of a wave and those decoded from its noisy latents."""

    feature_deviation: Tensor
    level_weight: Tensor

    def __init__(self, vae: SpectralVAE, config: VAELossConfig, adversary: AdversaryConfig) -> None:
        super().__init__()
        self.vae, self.config, self.adversary = vae, config, adversary
        self.discriminators = SpectrumDiscriminators(vae, adversary.width) if adversary.adversarial else None
        frequencies = vae.features.pooled.frequencies_hz()
        self.fine_bands = [_band(frequencies, low, high) for low, high in _FINE_BANDS_HZ]
        self.pitch_band = _band(frequencies, *_PITCH_BAND_HZ)
        weight = vae.feature_weight[: vae.features.mid_dim].square()
        self.register_buffer("level_weight", weight / weight.mean(), persistent=False)
        # Mean variance of a weighted feature, so that the loss is a share of what there is to explain.
        variance = vae.latent_scale.square().sum() / vae.features.dim
        self.register_buffer("feature_deviation", variance.sqrt(), persistent=False)

    def forward(
        self, wave: Tensor, drawn: Tensor | None = None, played: Tensor | None = None
    ) -> dict[str, Tensor]:
        """wave [batch, 2, samples], drawn latents [rows, latent_dim, frames] and what was played -> losses.

        played [rows, 2, samples]: the recordings in place of which the adversary is shown what is drawn.
        """
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
        if self.discriminators is not None:
            made, real = found, target
            if drawn is not None and played is not None:
                with torch.no_grad():
                    real = torch.cat([target, vae.features(played.float())])
                made = torch.cat([found, vae.decode_features(drawn).float()])
            losses |= contest(self.discriminators, made, real, matched=len(found))
            total = total + self.adversary.adversarial * losses["adversarial"] + losses["discriminator"]
            total = total + self.adversary.feature_matching * losses["feature_matching"]
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
