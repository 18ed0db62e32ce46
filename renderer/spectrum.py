"""Short-time spectra whose frame t is centred on samples 960 t .. 960 t + 959, and their pooled bins."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.common.audio import SAMPLE_RATE_HZ

_SILENT_POWER = 1e-18  # of a bin: a magnitude of 1e-9


class Stft(nn.Module):
    """A Hann-windowed transform with exactly ceil(samples / hop) frames, and its least-squares inverse."""

    window: Tensor

    def __init__(self, fft_size: int, hop_samples: int) -> None:
        super().__init__()
        self.fft_size, self.hop_samples = fft_size, hop_samples
        self.bins = fft_size // 2 + 1
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)

    def frames(self, samples: int) -> int:
        """Number of frames that cover the samples."""
        return -(-samples // self.hop_samples)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, samples] -> complex spectrum [batch, bins, frames]."""
        frames, lead = self.frames(wave.shape[-1]), self.hop_samples // 2
        padded = functional.pad(wave, (lead, frames * self.hop_samples - wave.shape[-1]))
        spectrum = torch.stft(
            padded,
            self.fft_size,
            self.hop_samples,
            window=self.window,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )
        return spectrum[..., :frames]  # the frame centred on the end of the last hop is not needed

    def inverse(self, spectrum: Tensor, samples: int | None = None) -> Tensor:
        """spectrum [batch, bins, frames] -> the wave [batch, samples] nearest to it (default all hops)."""
        lead, length = self.hop_samples // 2, spectrum.shape[-1] * self.hop_samples
        wave = torch.istft(
            spectrum, self.fft_size, self.hop_samples, window=self.window, center=True, length=lead + length
        )
        return wave[..., lead : lead + (length if samples is None else samples)]


class PooledBins(nn.Module):
    """Low bins as they are, higher ones in groups: what is left of a spectrum before its linear coding."""

    def __init__(self, bins: int, low_bins: int, group: int) -> None:
        super().__init__()
        self.low_bins, self.group = low_bins, group
        self.groups = (bins - low_bins) // group
        self.used = low_bins + self.groups * group
        self.rest = bins - self.used  # the top bins (Nyquist), which stay empty
        self.dim = low_bins + self.groups

    def frequencies_hz(self) -> Tensor:
        """Centre frequencies [dim]; the bin spacing follows from all bins up to half the sample rate."""
        bins = torch.arange(self.used, dtype=torch.float32)
        spacing = SAMPLE_RATE_HZ / 2 / (self.used + self.rest - 1)
        return self.mean(bins[None, None])[0, 0] * spacing

    def mean(self, values: Tensor) -> Tensor:
        """values [batch, frames, bins] -> means over each group [batch, frames, dim]."""
        low, high = values[..., : self.low_bins], values[..., self.low_bins : self.used]
        return torch.cat([low, high.unflatten(-1, (self.groups, self.group)).mean(dim=-1)], dim=-1)

    def spread(self, values: Tensor) -> Tensor:
        """values [batch, frames, dim] -> each value on all bins of its group [batch, frames, bins]."""
        low, high = values[..., : self.low_bins], values[..., self.low_bins :]
        return functional.pad(
            torch.cat([low, high.repeat_interleave(self.group, dim=-1)], dim=-1), (0, self.rest)
        )


def unit_phasors(spectrum: Tensor) -> Tensor:
    """Return complex numbers of length 1 (0 where there is silence) in the directions of the spectrum."""
    return with_magnitudes(spectrum, torch.ones((), device=spectrum.device))


def with_magnitudes(spectrum: Tensor, magnitudes: Tensor) -> Tensor:
    """Return complex numbers of these magnitudes in the directions of the spectrum (0 where it is silent)."""
    # Faster by half than magnitudes * spectrum / spectrum.abs(), which takes most of Griffin-Lim.
    power = spectrum.real.square() + spectrum.imag.square()
    return spectrum * (magnitudes * power.clamp_min(_SILENT_POWER).rsqrt())
