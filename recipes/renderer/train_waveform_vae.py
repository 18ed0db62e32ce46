"""The waveform autoencoder of the paper's size: Oobleck under ear-VAE's losses and an adversary (P 3.4).

Run: python -m duotok.recipes.renderer.train_waveform_vae \
         recipes/renderer/train_waveform_vae/base.yaml --out runs/base/vae
"""

import math
import sys
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from einops import rearrange
from scipy.signal import lfilter
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from duotok.recipes.renderer.adversary import Judgement, contest
from duotok.recipes.renderer.vae_excerpts import ExcerptConfig, draw_excerpt, read_items
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.waveform_vae import OobleckVAE, OobleckVAEConfig
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.loudness import K_WEIGHTING

_TAPS = 4096  # of the K-weighting; the slowest pole, at 38 Hz, has decayed to 1e-8
_LOG_FLOOR = 1e-5  # magnitude; that of a sine at full scale is 1
_QUIETEST_CHANNEL = 0.1  # of the loudest channel's norm: a nearly empty side is not all that counts
_HEARD = 0.01  # of the original's magnitude: below, the gradient of a phase would have no bound
_TINY = 1e-8
_CHANNELS = ("left", "right", "mid", "side")
_TERMS = ("convergence", "magnitude", "frequency", "group_delay", "correlation")
_SIDES = 2
_BAND_EDGES = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0)  # shares of the bins (DAC's code)
_SMALLEST_FFT = 64  # below, a band may have no bin
_PERIOD_WIDTHS = (1, 4, 16, 32, 32)
_SLOPE = 0.1


@dataclass(frozen=True, kw_only=True)
class DiscriminatorConfig:
    """Sizes of the discriminators: by default those of the papers."""

    periods: tuple[int, ...] = (2, 3, 5, 7, 11)  # samples
    period_width: int = 32  # channels of the first layer; the last has 32 times as many
    fft_sizes: tuple[int, ...] = (2048, 1024, 512)
    band_width: int = 32  # channels of each layer of a band

    def __post_init__(self) -> None:
        if not self.periods and not self.fft_sizes:
            raise ConfigError("discriminators need periods or fft_sizes")
        if min(self.periods, default=1) < 1:
            raise ConfigError(f"periods must be at least 1, got {self.periods}")
        if any(size < _SMALLEST_FFT or size % 4 for size in self.fft_sizes):
            raise ConfigError(
                f"fft_sizes must be multiples of 4 from {_SMALLEST_FFT} on, got {self.fft_sizes}"
            )
        for name in ("period_width", "band_width"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")


class Discriminators(nn.Module):
    """All discriminators of a config."""

    def __init__(self, config: DiscriminatorConfig) -> None:
        super().__init__()
        by_period = [PeriodDiscriminator(period, config.period_width) for period in config.periods]
        by_band = [BandDiscriminator(size, config.band_width) for size in config.fft_sizes]
        self.parts = nn.ModuleList([*by_period, *by_band])

    def forward(self, wave: Tensor) -> list[Judgement]:
        """wave [batch, 2, samples] -> one judgement per period, then one per FFT size."""
        return [part(wave) for part in self.parts]


class PeriodDiscriminator(nn.Module):
    """Judges a wave folded to rows of one period (HiFi-GAN, arXiv 2010.05646, 2.3)."""

    def __init__(self, period: int, width: int) -> None:
        super().__init__()
        self.period = period
        channels = (_SIDES, *(width * multiple for multiple in _PERIOD_WIDTHS))
        last = len(_PERIOD_WIDTHS) - 1
        self.layers = nn.ModuleList(
            weight_norm(nn.Conv2d(a, b, (5, 1), stride=(1 if n == last else 3, 1), padding=(2, 0)))
            for n, (a, b) in enumerate(pairwise(channels))
        )
        self.head = weight_norm(nn.Conv2d(channels[-1], 1, (3, 1), padding=(1, 0)))

    def forward(self, wave: Tensor) -> Judgement:
        """wave [batch, 2, samples] -> logits [batch, 1, rows, period]."""
        wave = functional.pad(wave, (0, -wave.shape[-1] % self.period), mode="reflect")
        hidden = wave.unflatten(-1, (-1, self.period))  # [batch, 2, samples / period, period]
        features = []
        for layer in self.layers:
            hidden = functional.leaky_relu(layer(hidden), _SLOPE)
            features.append(hidden)
        return Judgement(self.head(hidden), features)


class BandDiscriminator(nn.Module):
    """Judges the complex spectrum, each band by layers of its own (DAC, arXiv 2306.06546, 3.3)."""

    window: Tensor

    def __init__(self, fft_size: int, width: int) -> None:
        super().__init__()
        self.fft_size = fft_size
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)
        bins = fft_size // 2 + 1
        self.bands = [slice(int(low * bins), int(high * bins)) for low, high in pairwise(_BAND_EDGES)]
        self.stacks = nn.ModuleList(_band_stack(width) for _ in self.bands)
        self.head = weight_norm(nn.Conv2d(width, 1, (3, 3), padding=1))

    def forward(self, wave: Tensor) -> Judgement:
        """wave [batch, 2, samples], more than fft_size / 2 -> logits [batch, 1, frames, reduced bins]."""
        spectrum = self._spectrum(wave)
        features, ends = [], []
        for band, stack in zip(self.bands, self.stacks, strict=True):
            assert isinstance(stack, nn.ModuleList)
            hidden = spectrum[..., band]
            for layer in stack:
                hidden = functional.leaky_relu(layer(hidden), _SLOPE)
                features.append(hidden)
            ends.append(hidden)
        return Judgement(self.head(torch.cat(ends, dim=-1)), features)

    def _spectrum(self, wave: Tensor) -> Tensor:
        """Return real and imaginary parts as channels [batch, 4, frames, bins]."""
        flat, size, window = wave.float().flatten(0, 1), self.fft_size, self.window
        with torch.autocast(wave.device.type, enabled=False):  # there is no FFT of bfloat16
            spectrum = torch.stft(flat, size, size // 4, window=window, normalized=True, return_complex=True)
        parts = torch.view_as_real(spectrum)
        return rearrange(parts, "(b c) bins frames part -> b (c part) frames bins", c=_SIDES)


def _band_stack(width: int) -> nn.ModuleList:
    wide = [(2 * _SIDES, 1), (width, 2), (width, 2), (width, 2)]  # input channels, stride over bins
    layers = [nn.Conv2d(a, width, (3, 9), stride=(1, stride), padding=(1, 4)) for a, stride in wide]
    layers.append(nn.Conv2d(width, width, (3, 3), padding=1))
    return nn.ModuleList(weight_norm(layer) for layer in layers)


@dataclass(frozen=True, kw_only=True)
class WaveformLossConfig:
    """Weights of the losses; those of the channels are Stable Audio's: left, right, mean of mid and side."""

    fft_sizes: tuple[int, ...] = (2048, 1024, 512, 256, 128, 64)  # with hops of a quarter
    left: float = 0.5  # of the magnitudes' losses; phases are compared on left and right alone
    right: float = 0.5
    mid: float = 0.5
    side: float = 0.5
    convergence: float = 1.0  # norm of the magnitudes' error over that of the original's
    magnitude: float = 1.0  # absolute error of the magnitudes' logarithms
    frequency: float = 0.1  # error of the instantaneous frequency, radians per hop
    group_delay: float = 0.1  # error of the group delay, radians per bin
    correlation: float = 1.0  # 1 - correlation of the phases
    kl: float = 2e-4  # of the latents' divergence in nats per frame; Stable Audio's 1e-4 is of twice the nats

    def __post_init__(self) -> None:
        if not self.fft_sizes or any(size < 16 or size % 4 for size in self.fft_sizes):
            raise ConfigError(f"loss.fft_sizes must be multiples of 4 from 16 on, got {self.fft_sizes}")
        for name in (*_CHANNELS, *_TERMS, "kl"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"loss.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class AdversaryConfig:
    """Settings of the adversary; the weights are Stable Audio's."""

    start_step: int = 0  # optimizer steps without it
    adversarial: float = 0.1  # weight of the autoencoder's loss against the discriminators
    feature_matching: float = 5.0
    discriminators: DiscriminatorConfig = field(default_factory=DiscriminatorConfig)

    def __post_init__(self) -> None:
        for name in ("start_step", "adversarial", "feature_matching"):
            if not getattr(self, name) >= 0:
                raise ConfigError(f"adversary.{name} must not be negative, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: ExcerptConfig
    model: OobleckVAEConfig = field(default_factory=OobleckVAEConfig)
    loss: WaveformLossConfig = field(default_factory=WaveformLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model.sample_rate_hz != SAMPLE_RATE_HZ:
            raise ConfigError(
                f"model.sample_rate_hz must be the corpus's {SAMPLE_RATE_HZ}, got {self.model.sample_rate_hz}"
            )


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    items = read_items(config.data)
    vae = OobleckVAE(config.model)
    samples = round(config.data.seconds * SAMPLE_RATE_HZ) // vae.hop_samples * vae.hop_samples
    largest = max([*config.loss.fft_sizes, *config.adversary.discriminators.fft_sizes])
    if samples < largest:
        raise ConfigError(
            f"data.seconds={config.data.seconds} gives {samples} samples in whole hops, the largest of the "
            f"fft_sizes is {largest}; raise data.seconds"
        )

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        waves = [draw_excerpt(rng, items, config.data)[:, :samples] for _ in range(config.train.batch_size)]
        return {"wave": torch.stack(waves)}

    objective = WaveformObjective(vae, config.loss, config.adversary)
    return Task(objective, make_batch, vae.save_pretrained, takes_step=True)


class WaveformObjective(nn.Module):
    """Losses of the autoencoder plus those of its discriminators; neither's reach the other's weights."""

    def __init__(self, vae: OobleckVAE, loss: WaveformLossConfig, adversary: AdversaryConfig) -> None:
        super().__init__()
        self.vae, self.loss, self.adversary = vae, loss, adversary
        self.reconstruction = WaveformLosses(loss)
        self.discriminators = Discriminators(adversary.discriminators)

    def forward(self, wave: Tensor, step: Tensor) -> dict[str, Tensor]:
        """wave [batch, 2, samples], step [] (taken before) -> losses, the adversary's from its first step."""
        mean, deviation = (part.float() for part in self.vae.encode_distribution(wave))
        found = self.vae.decode(mean + deviation * torch.randn_like(mean), wave.shape[-1]).float()
        losses = {**self.reconstruction(found, wave), "kl": divergence(mean, deviation)}
        total = losses["reconstruction"] + self.loss.kl * losses["kl"]
        if int(step) >= self.adversary.start_step:
            losses |= contest(self.discriminators, found, wave)
            total = total + self.adversary.adversarial * losses["adversarial"]
            total = total + self.adversary.feature_matching * losses["feature_matching"]
            total = total + losses["discriminator"]
        else:
            # Data parallelism waits for a gradient of every weight.
            total = total + 0 * torch.stack([p.sum() for p in self.discriminators.parameters()]).sum()
        return {"total": total, **losses}


def divergence(mean: Tensor, deviation: Tensor) -> Tensor:
    """Nats per frame from N(0, 1) (Kingma, 1312.6114, B); mean, deviation [batch, latent_dim, frames]."""
    nats = 0.5 * (mean.square() + deviation.square() - 1) - deviation.log()
    return nats.sum(dim=1).mean()


class KWeighting(nn.Module):
    """Filter waves as the ear weighs them (ITU-R BS.1770-4), by the impulse response of its two biquads."""

    response: Tensor

    def __init__(self, taps: int = _TAPS) -> None:
        super().__init__()
        impulse = np.zeros(taps)
        impulse[0] = 1
        for numerator, denominator in K_WEIGHTING:
            impulse = lfilter(numerator, denominator, impulse)
        self.register_buffer("response", torch.from_numpy(np.asarray(impulse)).float(), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [..., samples] at 48 kHz, float32 -> weighted wave [..., samples]."""
        samples = wave.shape[-1]
        size = 2 ** math.ceil(math.log2(samples + len(self.response) - 1))
        product = torch.fft.rfft(wave, size) * torch.fft.rfft(self.response, size)
        return torch.fft.irfft(product, size)[..., :samples]


class WaveformLosses(nn.Module):
    """K-weighted spectra (ear-VAE, 2509.14912): magnitudes of left, right, mid, side, phases of two."""

    channel_weights: Tensor

    def __init__(self, config: WaveformLossConfig) -> None:
        super().__init__()
        self.config = config
        self.weighting = KWeighting()
        weights = torch.tensor([getattr(config, channel) for channel in _CHANNELS])
        self.register_buffer("channel_weights", weights, persistent=False)

    def forward(self, found: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the losses without their weights, and "reconstruction", the weighted sum.

        found, target: [batch, 2, samples], more samples than half of the largest FFT size.
        """
        # Half precision has no FFT, and its logarithms of quiet bins would be noise.
        with torch.autocast(found.device.type, enabled=False):
            found, target = (self.weighting(_four_channels(wave.float())) for wave in (found, target))
            rows = [self._compare(found, target, size) for size in self.config.fft_sizes]
        losses = {name: torch.stack([row[name] for row in rows]).mean() for name in _TERMS}
        weighted = [getattr(self.config, name) * value for name, value in losses.items()]
        return {"reconstruction": torch.stack(weighted).sum(), **losses}

    def _compare(self, found: Tensor, target: Tensor, size: int) -> dict[str, Tensor]:
        given, wanted = (_spectrum(wave, size) for wave in (found, target))
        magnitudes = given.abs(), wanted.abs()
        sides = given[:, :2], wanted[:, :2]
        frequency, group_delay = phase_errors(*sides)
        return {
            "convergence": spectral_convergence(*magnitudes) @ self.channel_weights,
            "magnitude": log_magnitude_error(*magnitudes) @ self.channel_weights,
            "frequency": frequency,
            "group_delay": group_delay,
            "correlation": phase_decorrelation(*sides),
        }


def spectral_convergence(given: Tensor, wanted: Tensor) -> Tensor:
    """Relative error of magnitudes [batch, channels, bins, frames], [channels] (Arik et al., 1808.06719)."""
    norm = torch.linalg.vector_norm(wanted, dim=(2, 3))
    smallest = _QUIETEST_CHANNEL * norm.amax(dim=1, keepdim=True)
    silence = _LOG_FLOOR * math.sqrt(wanted.shape[2] * wanted.shape[3])
    error = torch.linalg.vector_norm(given - wanted, dim=(2, 3))
    return (error / torch.maximum(norm, smallest).clamp_min(silence)).mean(dim=0)


def log_magnitude_error(given: Tensor, wanted: Tensor) -> Tensor:
    """Mean absolute error of natural logarithms (1808.06719); shapes as in spectral_convergence."""
    return ((given + _LOG_FLOOR).log() - (wanted + _LOG_FLOOR).log()).abs().mean(dim=(0, 2, 3))


def phase_errors(given: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean errors of instantaneous frequency (per hop) and group delay (per bin), 0 to pi radians.

    given, wanted: complex spectra [batch, channels, bins, frames]; the original's magnitudes are the weights.
    """
    magnitude = wanted.abs()
    heard = given.abs() > _HEARD * magnitude + _TINY
    error = torch.where(heard, given, given.detach()).angle() - wanted.angle()
    return _weighted_step(error, magnitude, dim=3), _weighted_step(error, magnitude, dim=2)


def phase_decorrelation(given: Tensor, wanted: Tensor) -> Tensor:
    """1 - the cosine of the phases of complex spectra, weighted by magnitudes: 0 for equal, 2 opposite."""
    magnitudes = (given.abs() * wanted.abs()).sum(dim=(2, 3))
    in_phase = (given * wanted.conj()).real.sum(dim=(2, 3))
    return ((magnitudes - in_phase) / magnitudes.clamp_min(_TINY)).mean()


def _weighted_step(error: Tensor, magnitude: Tensor, dim: int) -> Tensor:
    """Mean size of the wrapped steps of a phase error along a dimension."""
    steps = error.diff(dim=dim)
    steps = steps - 2 * math.pi * (steps / (2 * math.pi)).round()
    length = magnitude.shape[dim]
    weight = torch.minimum(magnitude.narrow(dim, 0, length - 1), magnitude.narrow(dim, 1, length - 1))
    weighted = (steps.abs() * weight).sum(dim=(2, 3))
    return (weighted / weight.sum(dim=(2, 3)).clamp_min(_TINY)).mean()


def _four_channels(wave: Tensor) -> Tensor:
    """wave [batch, 2, samples] -> left, right, mid and side [batch, 4, samples], all of equal power."""
    left, right = wave.unbind(dim=1)
    mid, side = (left + right) * math.sqrt(0.5), (left - right) * math.sqrt(0.5)
    return torch.stack([left, right, mid, side], dim=1)


def _spectrum(wave: Tensor, size: int) -> Tensor:
    """wave [batch, channels, samples] -> complex [batch, channels, bins, frames], 1 for a full-scale sine."""
    window = torch.hann_window(size, device=wave.device)
    spectrum = torch.stft(wave.flatten(0, 1), size, size // 4, window=window, return_complex=True)
    return spectrum.unflatten(0, wave.shape[:2]) * (2 / window.sum())


main = recipe_main("Waveform autoencoder", Config, build)

if __name__ == "__main__":
    sys.exit(main())
