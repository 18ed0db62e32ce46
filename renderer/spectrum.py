"""Short-time spectra whose frame t is centred on samples 960 t .. 960 t + 959, and their pooled bins."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.common.audio import SAMPLE_RATE_HZ


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


class StereoSpectrum(NamedTuple):
    """What a decoder knows of a stereo sound: everything but the phase of the middle."""

    mid: Tensor  # [batch, bins, frames] magnitude of (left + right) / 2
    side: Tensor  # [batch, bins, frames] magnitude of (left - right) / 2
    coherence: Tensor  # [batch, bins, frames] in -1..1: 1 = side in phase with mid (left), -1 = right


class StereoFeatures(nn.Module):
    """Compressed stereo spectra: mid^p, side^p and coherence * side^p of the pooled bins.

    The power p < 1 keeps loud partials (pitch, chords) distinct and quiet detail audible; a logarithm spends
    the few latents on noise. The coherence says on which side a sound is, which magnitudes alone cannot.
    """

    PARTS = 3

    def __init__(self, *, fft_size: int, hop_samples: int, low_bins: int, group: int, power: float) -> None:
        super().__init__()
        self.stft = Stft(fft_size, hop_samples)
        self.pooled = PooledBins(self.stft.bins, low_bins, group)
        self.power = power
        self.dim = self.PARTS * self.pooled.dim

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> features [batch, frames, dim]."""
        left, right = wave.unbind(dim=1)
        mid, side = (self.stft(part).transpose(1, 2) for part in ((left + right) / 2, (left - right) / 2))
        mid_power, side_power = (self.pooled.mean(part.abs().square()) for part in (mid, side))
        cross = self.pooled.mean((side * mid.conj()).real)
        coherence = (cross / (mid_power * side_power).sqrt().clamp_min(1e-9)).clamp(-1, 1)
        compressed_side = side_power.pow(self.power / 2)
        return torch.cat(
            [mid_power.pow(self.power / 2), compressed_side, coherence * compressed_side], dim=-1
        )

    def magnitudes(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> pooled mid and side magnitudes [batch, frames, 2, dim / 3]."""
        compressed = features[..., : 2 * self.pooled.dim].unflatten(-1, (2, self.pooled.dim))
        return compressed.clamp_min(0).pow(1 / self.power)

    def spectrum(self, features: Tensor) -> StereoSpectrum:
        """features [batch, frames, dim] -> full-resolution magnitudes and coherence."""
        mid, side = self.pooled.spread(self.magnitudes(features)).transpose(1, 3).unbind(dim=2)
        _, compressed_side, signed_side = features.chunk(3, dim=-1)
        coherence = (signed_side / compressed_side.clamp_min(1e-3)).clamp(-1, 1)
        return StereoSpectrum(mid=mid, side=side, coherence=self.pooled.spread(coherence).transpose(1, 2))
