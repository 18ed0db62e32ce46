"""Discriminators of stereo waves: by periods (HiFi-GAN) and by bands of complex spectra (DAC)."""

from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import weight_norm

from ..tokenizer.common.errors import ConfigError

_CHANNELS = 2
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


class Judgement(NamedTuple):
    """What one discriminator says of a batch."""

    logits: Tensor  # [batch, 1, ...]; trained towards 1 for recordings, 0 for rebuilt waves
    features: list[Tensor]  # the activations of each layer before, [batch, channels, ...]


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
        channels = (_CHANNELS, *(width * multiple for multiple in _PERIOD_WIDTHS))
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
        with torch.autocast(wave.device.type, enabled=False):  # there is no FFT of bfloat16
            spectrum = torch.stft(
                wave.float().flatten(0, 1),
                self.fft_size,
                self.fft_size // 4,
                window=self.window,
                normalized=True,
                return_complex=True,
            )
        parts = torch.view_as_real(spectrum)
        return rearrange(parts, "(b c) bins frames part -> b (c part) frames bins", c=_CHANNELS)


def _band_stack(width: int) -> nn.ModuleList:
    wide = [(2 * _CHANNELS, 1), (width, 2), (width, 2), (width, 2)]  # input channels, stride over bins
    layers = [nn.Conv2d(a, width, (3, 9), stride=(1, stride), padding=(1, 4)) for a, stride in wide]
    layers.append(nn.Conv2d(width, width, (3, 3), padding=1))
    return nn.ModuleList(weight_norm(layer) for layer in layers)
