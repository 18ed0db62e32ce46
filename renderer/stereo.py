"""What a coder keeps of a stereo sound: its middle in single bins, and how its side differs from that."""

import torch
from torch import Tensor, nn

from ..tokenizer.common.audio import SAMPLE_RATE_HZ
from .spectrum import PooledBins, Stft, unit_phasors

SPECTRUM, BANDS = "spectrum", "bands"
CODINGS = (SPECTRUM, BANDS)
_BAND_FLOOR = 0.1  # power of a band below which its gains fade out; a full-scale tone has about 1e6
_LARGEST_GAIN = 2.0


class StereoFeatures(nn.Module):
    """Compressed spectra of the middle, and the side beside it.

    The power p < 1 keeps loud partials (pitch, chords) distinct and quiet detail audible; a logarithm spends
    the few latents on noise. Two codings of the side, each in two parts:

    - spectrum: side^p of the pooled bins and coherence * side^p, a spectrum of its own. The coherence says on
      which side a sound is, which magnitudes alone cannot.
    - bands: gains relative to the middle in bands of equal ERB rate (as parametric stereo: Breebaart et al.
      2005): of what moves with the middle (that pans it, negative = right) and of the rest (that widens it).
      The side made of them is the middle filtered, so its spectrum is a sound's again and keeps its energy.
    """

    band_filters: Tensor

    def __init__(
        self,
        *,
        fft_size: int,
        hop_samples: int,
        low_bins: int,
        group: int,
        power: float,
        coding: str = SPECTRUM,
        bands: int = 32,
    ) -> None:
        super().__init__()
        self.stft = Stft(fft_size, hop_samples)
        self.pooled = PooledBins(self.stft.bins, low_bins, group)
        self.power = power
        self.coding = coding
        self.mid_dim = self.pooled.dim
        self.part_dim = bands if coding == BANDS else self.pooled.dim  # of each of the two parts of the side
        self.side_dim = 2 * self.part_dim
        self.dim = self.mid_dim + self.side_dim
        frequencies = torch.linspace(0, 1, self.stft.bins) * (SAMPLE_RATE_HZ / 2)
        self.register_buffer("band_filters", band_filters(frequencies, bands), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, 2, samples] -> features [batch, frames, dim]."""
        left, right = wave.unbind(dim=1)
        mid, side = (self.stft(part).transpose(1, 2) for part in ((left + right) / 2, (left - right) / 2))
        mid_power, side_power, cross = mid.abs().square(), side.abs().square(), (side * mid.conj()).real
        compressed_mid = self.pooled.mean(mid_power).pow(self.power / 2)
        code = self._gains if self.coding == BANDS else self._compressed_side
        return torch.cat([compressed_mid, *code(mid_power, side_power, cross)], dim=-1)

    def weights(self, corner_hz: float) -> Tensor:
        """How much each feature counts [dim]: (1 + f / corner)^-1/2, of a gain at the middle of its band."""
        side_hz = self.pooled.frequencies_hz()
        if self.coding == BANDS:
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
        if self.coding == BANDS:
            gains = torch.complex(first @ self.band_filters.T, second.clamp_min(0) @ self.band_filters.T)
            return gains.transpose(1, 2) * mid
        magnitude = self.pooled.spread(first.clamp_min(0).pow(1 / self.power))
        coherence = self.pooled.spread((second / first.clamp_min(1e-3)).clamp(-1, 1))
        side = magnitude * torch.complex(coherence, (1 - coherence.square()).clamp_min(0).sqrt())
        return side.transpose(1, 2) * unit_phasors(mid)

    def _compressed_side(self, mid_power: Tensor, side_power: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        mid_power, side_power, cross = (self.pooled.mean(x) for x in (mid_power, side_power, cross))
        coherence = (cross / (mid_power * side_power).sqrt().clamp_min(1e-9)).clamp(-1, 1)
        compressed = side_power.pow(self.power / 2)
        return compressed, coherence * compressed

    def _gains(self, mid_power: Tensor, side_power: Tensor, cross: Tensor) -> tuple[Tensor, Tensor]:
        mid_power, side_power, cross = (x @ self.band_filters for x in (mid_power, side_power, cross))
        with_mid = cross / (mid_power + _BAND_FLOOR)
        whole = side_power / (mid_power + _BAND_FLOOR)
        beside = (whole - with_mid.square()).clamp_min(0).sqrt()
        return with_mid.clamp(-_LARGEST_GAIN, _LARGEST_GAIN), beside.clamp_max(_LARGEST_GAIN)


def band_filters(frequencies_hz: Tensor, bands: int) -> Tensor:
    """Return overlapping triangles [bins, bands], equally wide in ERB rate (Glasberg and Moore 1990).

    At every frequency they add up to 1.
    """
    rate = (1 + 0.00437 * frequencies_hz).log10()
    place = rate / rate.max() * (bands - 1)
    return (1 - (place[:, None] - torch.arange(bands)).abs()).clamp_min(0)
