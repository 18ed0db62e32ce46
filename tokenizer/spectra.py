"""Front ends of a 48 kHz wave: standard level, and log-mel and chroma aligned to token frames."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from .common.audio import SAMPLE_RATE_HZ
from .common.long_waves import blocks

_CACHED_FRAMES = 64  # whose spectra a core's cache holds
LOG_FLOOR = 1e-4  # of the mel magnitude; -80 dB under a full-scale sine's order of magnitude


class LogMel(nn.Module):
    """log10-mel magnitudes at 100 Hz (hop 480); frame i is centred at sample 480 i."""

    mel_filters: Tensor
    window: Tensor

    def __init__(self, bands: int, fft_size: int = 4096, hop_samples: int = 480) -> None:
        super().__init__()
        self.fft_size, self.hop_samples = fft_size, hop_samples
        self.register_buffer("mel_filters", mel_filterbank(bands, fft_size), persistent=False)
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, samples] -> [batch, samples // hop, bands]; samples must be a multiple of the hop."""
        return 0.5 * self.power(wave, self.hop_samples).clamp_min(LOG_FLOOR**2).log10()

    def power(self, wave: Tensor, hop_samples: int) -> Tensor:
        """Return the power per mel band [batch, samples // hop_samples, bands]."""
        return stft_power(wave, self.window, hop_samples, len(self.mel_filters)) @ self.mel_filters


class Chroma(nn.Module):
    """Chroma at 50 Hz (hop 960): root of the power per pitch class over the frame's largest; 0 in silence."""

    SILENCE = 1e-3

    chroma_filters: Tensor
    window: Tensor

    def __init__(self, fft_size: int = 8192, hop_samples: int = 960) -> None:
        super().__init__()
        self.fft_size, self.hop_samples = fft_size, hop_samples
        self.register_buffer("chroma_filters", chroma_filterbank(fft_size), persistent=False)
        self.register_buffer("window", torch.hann_window(fft_size), persistent=False)

    def forward(self, wave: Tensor) -> Tensor:
        """wave [batch, samples] -> [batch, samples // hop, 12] in 0..1, bin 0 = C."""
        power = (
            stft_power(wave, self.window, self.hop_samples, len(self.chroma_filters)) @ self.chroma_filters
        )
        amplitudes = power.sqrt()
        return amplitudes / amplitudes.amax(dim=-1, keepdim=True).clamp_min(self.SILENCE)


def stft_power(wave: Tensor, window: Tensor, hop_samples: int, bins: int) -> Tensor:
    """Return the power [batch, samples // hop, bins] of the lowest STFT bins; a full sine peaks at 1."""
    size = window.numel()
    padded = functional.pad(wave, (size // 2, size // 2))
    frames = padded.unfold(-1, size, hop_samples)[:, : wave.shape[-1] // hop_samples]
    window = window * (2 / window.sum())
    at_once = max(1, _CACHED_FRAMES // len(wave)) if wave.device.type == "cpu" else frames.shape[1]
    powers = []
    for part in frames.split(max(1, at_once), dim=1):
        spectrum = torch.fft.rfft(part * window)[..., :bins]
        powers.append(spectrum.real.square() + spectrum.imag.square())
    return torch.cat(powers, dim=1)


def mel_filterbank(bands: int, fft_size: int, low_hz: float = 30.0, high_hz: float = 20_000.0) -> Tensor:
    """Return triangular filters [bins up to high_hz, bands] on the Slaney mel scale, each with unit peak."""
    edges = _mel_to_hz(
        torch.linspace(_hz_to_mel(low_hz), _hz_to_mel(high_hz), bands + 2, dtype=torch.float64)
    )
    bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64) * SAMPLE_RATE_HZ / fft_size
    # A band narrower than two FFT bins would be empty: widen its flanks to one bin.
    resolution = SAMPLE_RATE_HZ / fft_size
    left = (edges[1:-1] - edges[:-2]).clamp_min(resolution)
    right = (edges[2:] - edges[1:-1]).clamp_min(resolution)
    distance = bins[:, None] - edges[None, 1:-1]
    weights = torch.minimum(1 + distance / left, 1 - distance / right).clamp_min(0)
    return weights[bins <= high_hz + resolution].float()


def chroma_filterbank(fft_size: int, low_hz: float = 65.0, high_hz: float = 2_500.0) -> Tensor:
    """Return weights [bins up to high_hz, 12]: a Gaussian of a third of a semitone per pitch class."""
    bins = torch.arange(fft_size // 2 + 1, dtype=torch.float64) * SAMPLE_RATE_HZ / fft_size
    pitch = 69 + 12 * torch.log2(bins.clamp_min(1.0) / 440.0)
    distance = (pitch[:, None] - torch.arange(12)[None, :] + 6) % 12 - 6  # midi 0 is a C
    weights = torch.exp(-0.5 * (distance / 0.35) ** 2)
    # Each octave holds twice the bins of the one below: even that out, and leave out rumble and hiss.
    weights = weights * (440.0 / bins.clamp_min(1.0))[:, None]
    weights[bins < low_hz] = 0
    return weights[bins <= high_hz].float()


def _hz_to_mel(frequency_hz: float) -> float:
    if frequency_hz < 1000.0:
        return frequency_hz * 3 / 200
    return 15.0 + math.log(frequency_hz / 1000.0) * 27 / math.log(6.4)


def _mel_to_hz(mel: Tensor) -> Tensor:
    linear = mel * 200 / 3
    return torch.where(mel < 15.0, linear, 1000.0 * torch.exp((mel - 15.0) * math.log(6.4) / 27))


TARGET_RMS = 0.1
BLOCK_SAMPLES = 19_200  # 0.4 s


def level_gain(wave: Tensor) -> Tensor:
    """Return the gain [batch, 1] that brings the active parts of a wave to RMS 0.1.

    wave: [batch, samples], or [batch, channels, samples], of which the middle counts. Active blocks are those
    within 30 dB of the loudest; a silent wave has gain 1.
    """
    powers = []
    for _, (part,) in blocks(wave, samples=75 * BLOCK_SAMPLES):
        mono = part if part.ndim == 2 else part.mean(dim=1)
        padded = functional.pad(mono, (0, -mono.shape[-1] % BLOCK_SAMPLES))
        powers.append(padded.unflatten(-1, (-1, BLOCK_SAMPLES)).square().mean(dim=-1))
    power = torch.cat(powers, dim=-1)  # [batch, blocks]
    active = power >= power.amax(dim=-1, keepdim=True) * 1e-3
    mean_power = (power * active).sum(dim=-1, keepdim=True) / active.sum(dim=-1, keepdim=True)
    gain = TARGET_RMS / mean_power.clamp_min(1e-12).sqrt()
    return torch.where(mean_power > 1e-10, gain, torch.ones_like(gain))
