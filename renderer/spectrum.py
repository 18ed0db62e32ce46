"""Short-time spectra of stereo sound, what a coder keeps of them, and phases for magnitudes alone."""

import math

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
        frames, size, hop = self.frames(wave.shape[-1]), self.fft_size, self.hop_samples
        padded = functional.pad(wave, (hop // 2, frames * hop - wave.shape[-1]))
        spectrum = torch.stft(padded, size, hop, window=self.window, pad_mode="constant", return_complex=True)
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


def with_magnitudes(spectrum: Tensor, magnitudes: Tensor) -> Tensor:
    """Return complex numbers of these magnitudes in the directions of the spectrum (0 where it is silent)."""
    # Faster by half than magnitudes * spectrum / spectrum.abs(), which takes most of Griffin-Lim.
    power = spectrum.real.square() + spectrum.imag.square()
    return spectrum * (magnitudes * power.clamp_min(_SILENT_POWER).rsqrt())


_BAND_FLOOR = 0.1  # power of a band below which its gains fade out; a full-scale tone has about 1e6
_LARGEST_GAIN = 2.0


class StereoFeatures(nn.Module):
    """Compressed spectrum of the middle, and the side beside it.

    The power p < 1 keeps loud partials (pitch, chords) distinct and quiet detail audible; a logarithm spends
    the few latents on noise. The side is gains relative to the middle in bands of equal ERB rate (as in
    parametric stereo: Breebaart et al. 2005): of what moves with the middle (that pans it, negative = right)
    and of the rest (that widens it). It is the middle filtered: a sound's spectrum, which keeps its energy.
    """

    band_filters: Tensor

    def __init__(
        self, *, fft_size: int, hop_samples: int, low_bins: int, group: int, power: float, bands: int
    ) -> None:
        super().__init__()
        self.stft = Stft(fft_size, hop_samples)
        self.pooled = PooledBins(self.stft.bins, low_bins, group)
        self.power = power
        self.bands, self.mid_dim, self.side_dim = bands, self.pooled.dim, 2 * bands
        self.dim = self.mid_dim + self.side_dim
        frequencies = torch.linspace(0, 1, self.stft.bins) * (SAMPLE_RATE_HZ / 2)
        self.register_buffer("band_filters", band_filters(frequencies, bands), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> features [batch, frames, dim]."""
        left, right = wave.unbind(dim=1)
        mid, side = (self.stft(part).transpose(1, 2) for part in ((left + right) / 2, (left - right) / 2))
        mid_power, side_power, cross = mid.abs().square(), side.abs().square(), (side * mid.conj()).real
        compressed_mid = self.pooled.mean(mid_power).pow(self.power / 2)
        mid_power, side_power, cross = (x @ self.band_filters for x in (mid_power, side_power, cross))
        with_mid = cross / (mid_power + _BAND_FLOOR)
        whole = side_power / (mid_power + _BAND_FLOOR)
        beside = (whole - with_mid.square()).clamp_min(0).sqrt().clamp_max(_LARGEST_GAIN)
        return torch.cat([compressed_mid, with_mid.clamp(-_LARGEST_GAIN, _LARGEST_GAIN), beside], dim=-1)

    def weights(self, corner_hz: float) -> Tensor:
        """How much each feature counts [dim]: (1 + f / corner)^-1/2, of a gain at the middle of its band."""
        places = torch.linspace(0, 1, self.stft.bins) * (SAMPLE_RATE_HZ / 2)
        side_hz = places @ self.band_filters / self.band_filters.sum(dim=0)
        frequencies = torch.cat([self.pooled.frequencies_hz(), side_hz, side_hz])
        return (corner_hz / (frequencies + corner_hz)).sqrt()

    def magnitudes(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> pooled magnitudes of the middle [batch, frames, mid_dim]."""
        return features[..., : self.mid_dim].clamp_min(0).pow(1 / self.power)

    def mid_magnitudes(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> magnitudes of the middle [batch, bins, frames]."""
        return self.pooled.spread(self.magnitudes(features)).transpose(1, 2)

    def side_spectrum(self, features: Tensor, mid: Tensor) -> Tensor:
        """features [batch, frames, dim] and the middle [batch, bins, frames] -> the side, both complex.

        It follows the phase of the middle where both hold the same sound (that is what pans it), and is
        turned by a quarter where they do not (that is what makes it wide): no search, nothing cancels.
        """
        first, second = features[..., self.mid_dim :].chunk(2, dim=-1)
        gains = torch.complex(first @ self.band_filters.T, second.clamp_min(0) @ self.band_filters.T)
        return gains.transpose(1, 2) * mid


def band_filters(frequencies_hz: Tensor, bands: int) -> Tensor:
    """Return triangles [bins, bands] of equal ERB width that add up to 1 (Glasberg and Moore 1990)."""
    rate = (1 + 0.00437 * frequencies_hz).log10()
    place = rate / rate.max() * (bands - 1)
    return (1 - (place[:, None] - torch.arange(bands)).abs()).clamp_min(0)


def advance_phases(magnitudes: Tensor, stft: Stft, first_phase: Tensor | None = None) -> Tensor:
    """Return phases [batch, bins, frames] in radians that let each spectral peak run on at its frequency.

    Single pass spectrogram inversion (Beauregard, Harish and Wyse, 2015):
    the frequency of a peak comes from a parabola through three log magnitudes, the bins around it share its
    phase. magnitudes [batch, bins, frames]; first_phase [batch, bins] is that of the first frame (default 0).
    """
    level = magnitudes.transpose(1, 2).clamp_min(1e-5).log()  # [batch, frames, bins]
    below, here, above = level[..., :-2], level[..., 1:-1], level[..., 2:]
    bins = torch.arange(1, level.shape[-1] - 1, device=level.device)
    offset = 0.5 * (below - above) / (below - 2 * here + above).clamp_max(-1e-6)
    frequency = (bins + offset.clamp(-0.5, 0.5)) * (2 * math.pi / stft.fft_size)  # radians per sample
    peaks = _nearest_peaks((here > below) & (here >= above), bins)
    frequency = frequency.gather(-1, peaks)
    # Phases refer to the middle of the window, where all bins of a peak agree.
    centring = math.pi * torch.arange(level.shape[-1], device=level.device)
    phase = torch.zeros_like(level[:, 0]) if first_phase is None else first_phase + centring
    phase = phase[:, 1:-1]
    phases = [phase]
    for frame in range(1, level.shape[1]):
        step = stft.hop_samples * 0.5 * (frequency[:, frame - 1] + frequency[:, frame])
        phase = torch.remainder(phase.gather(-1, peaks[:, frame]) + step, 2 * math.pi)
        phases.append(phase)
    return (functional.pad(torch.stack(phases, dim=1), (1, 1)) - centring).transpose(1, 2)


def griffin_lim(
    magnitudes: Tensor,
    stft: Stft,
    *,
    iterations: int,
    momentum: float = 0.99,
    held: Tensor | None = None,
    held_end: Tensor | None = None,
) -> Tensor:
    """Return waves [batch, frames * hop] with about these magnitudes [batch, bins, frames]; deterministic.

    Fast Griffin-Lim (Perraudin, Balazs and Sondergaard, 2013) from the phases of advance_phases.
    held, held_end: complex spectra [batch, bins, k] of the first and of the last k frames, known from sound
    that is already there; they stay as they are.
    """
    known = 0 if held is None else held.shape[-1]
    until = magnitudes.shape[-1] - (0 if held_end is None else held_end.shape[-1])
    if held is None:
        phases = advance_phases(magnitudes, stft)
    else:
        later = advance_phases(magnitudes[..., known - 1 :], stft, held[..., -1].angle())
        phases = functional.pad(later, (known - 1, 0))

    def impose(direction: Tensor) -> Tensor:
        target = with_magnitudes(direction, magnitudes)
        if held is not None:
            target[..., :known] = held
        if held_end is not None:
            target[..., until:] = held_end
        return target

    target = impose(torch.polar(torch.ones_like(phases), phases))
    previous: Tensor | None = None
    for _ in range(iterations):
        spectrum = stft(stft.inverse(target))
        ahead = spectrum if previous is None else spectrum - previous * (momentum / (1 + momentum))
        previous = spectrum
        target = impose(ahead)
    return stft.inverse(target)


def _nearest_peaks(is_peak: Tensor, bins: Tensor) -> Tensor:
    """Return for each inner bin the index (among the inner bins) of the nearest peak."""
    index = (bins - 1).expand_as(is_peak)
    far = 4 * len(bins)
    before = torch.where(is_peak, index, -far).cummax(dim=-1).values
    after = -torch.where(is_peak, -index, -far).flip(-1).cummax(dim=-1).values.flip(-1)
    return torch.where(index - before <= after - index, before, after).clamp(0, len(bins) - 1)
