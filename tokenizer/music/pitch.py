"""Sung pitch (YIN; de Cheveigne and Kawahara 2002), and how well an accompaniment's chroma fits it.

Coherence is harmony and in-key share as the evaluation defines them, on a light pitch tracker and the
tokenizer's chroma, so that `generate` needs no evaluation packages.
"""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.audio import SAMPLE_RATE_HZ
from ..common.long_waves import let_go
from .harmony import estimate_key

PITCH_RATE_HZ = 50.0
_DECIMATION = 4  # 12 kHz is plenty for a fundamental below 1 kHz
_RATE_HZ = SAMPLE_RATE_HZ // _DECIMATION
_HOP_SAMPLES = int(_RATE_HZ / PITCH_RATE_HZ)
_WINDOW_SAMPLES = 512  # 43 ms of integration
_LOWEST_HZ, _HIGHEST_HZ = 65.0, 1_000.0
_THRESHOLD = 0.15
_CHUNK_FRAMES, _CACHED_FRAMES = 1_000, 100  # of the wave that are read, and that are worked on, at once
_QUIET_DB = 40.0  # frames this far below the loudest are not singing


def sung_pitch(wave: Tensor) -> np.ndarray:
    """MIDI pitch (float) of each frame at 50 Hz, NaN where nothing is sung: [frames].

    wave: [channels, samples] at 48 kHz, one voice.
    """
    longest = int(_RATE_HZ / _LOWEST_HZ)
    span = _WINDOW_SAMPLES + longest + 1
    frames = -(-wave.shape[-1] // (_HOP_SAMPLES * _DECIMATION))
    pieces = []
    for start in range(0, frames, _CHUNK_FRAMES):
        count = min(_CHUNK_FRAMES, frames - start)
        first = start * _HOP_SAMPLES - span // 2
        low = _decimate(wave, first, first + (count - 1) * _HOP_SAMPLES + span)
        pieces += map(_yin, low.unfold(0, span, _HOP_SAMPLES).split(_CACHED_FRAMES))
        let_go(wave)
    pitch_hz = torch.cat([pitch for pitch, _ in pieces])
    energy = torch.cat([power for _, power in pieces])
    sung = (pitch_hz > 0) & (energy > energy.max() * 10 ** (-_QUIET_DB / 10))
    midi = 69 + 12 * torch.log2(pitch_hz.clamp(min=1.0) / 440.0)
    return torch.where(sung, midi, torch.nan).numpy().astype(np.float64)


def _decimate(wave: Tensor, first: int, end: int) -> Tensor:
    """Samples first..end of the middle of a wave at 12 kHz; outside of the wave is silence."""
    samples = wave.shape[-1]
    begin, stop = max(0, first), min(-(-samples // _DECIMATION), end)
    half = 2 * _DECIMATION
    low, high = begin * _DECIMATION - half, (stop - 1) * _DECIMATION + half + 1
    mono = wave[:, max(0, low) : high].float().mean(dim=0, keepdim=True).cpu()
    mono = torch.nn.functional.pad(mono, (max(0, -low), max(0, high - samples)))
    kernel = torch.hann_window(2 * half + 1, periodic=False)
    found = torch.nn.functional.conv1d(mono, (kernel / kernel.sum())[None, None], stride=_DECIMATION)[0]
    return torch.nn.functional.pad(found, (begin - first, end - stop))


def _yin(frames: Tensor) -> tuple[Tensor, Tensor]:
    """Fundamental in Hz (0 = unvoiced) and energy of each frame [count, span]."""
    longest = frames.shape[1] - _WINDOW_SAMPLES - 1
    shortest = int(_RATE_HZ / _HIGHEST_HZ)
    head = frames[:, :_WINDOW_SAMPLES]
    size = 1 << (frames.shape[1] + _WINDOW_SAMPLES).bit_length()
    cross = torch.fft.irfft(torch.fft.rfft(frames, size) * torch.fft.rfft(head, size).conj(), size)
    cross = cross[:, : longest + 1]
    squares = torch.nn.functional.pad(frames.double().square().cumsum(dim=1), (1, 0))
    moving = (squares[:, _WINDOW_SAMPLES : _WINDOW_SAMPLES + longest + 1] - squares[:, : longest + 1]).float()
    difference = (moving[:, :1] + moving - 2 * cross).clamp(min=0)[:, 1:]  # lags 1 .. longest
    lags = torch.arange(1, longest + 1)
    normalized = difference * lags / difference.cumsum(dim=1).clamp(min=1e-9)
    allowed = normalized[:, shortest - 1 :]
    # The first dip below the threshold, followed down to its bottom.
    below = allowed < _THRESHOLD
    first = below.int().argmax(dim=1)
    rising = torch.nn.functional.pad(allowed[:, 1:] >= allowed[:, :-1], (0, 1), value=True)
    after = torch.arange(allowed.shape[1])[None] >= first[:, None]
    bottom = (rising & after).int().argmax(dim=1)
    centre = (bottom + shortest - 1).clamp(1, longest - 2)
    left, mid, right = (normalized.gather(1, (centre + shift)[:, None])[:, 0] for shift in (-1, 0, 1))
    bend = left - 2 * mid + right
    offset = torch.where(bend > 1e-9, (0.5 * (left - right) / bend.clamp(min=1e-9)).clamp(-1, 1), 0.0)
    pitch = _RATE_HZ / (lags[centre] + offset)
    energy = moving[:, 0]
    return torch.where(below.any(dim=1) & (energy > 1e-6), pitch, 0.0), energy


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """Fit of one accompaniment to one vocal; None where nothing is sung or no key can be heard."""

    harmony: float | None  # share of chroma energy at the sung pitch class x 12; 1.0 = chance
    in_key: float | None  # share of sung frames inside the accompaniment's key, 0 to 1

    @property
    def score(self) -> float:
        """What to rank candidates by, higher is better: in-key share plus half the octaves of harmony."""
        harmony = 0.5 * math.log2(max(self.harmony, 0.05)) if self.harmony is not None else 0.0
        return (self.in_key or 0.0) + harmony


def measure_coherence(chroma: np.ndarray, pitches: np.ndarray) -> Coherence:
    """Compare accompaniment chroma [frames, 12] with sung MIDI pitches [frames], NaN = not sung."""
    frames = min(len(chroma), len(pitches))
    sung = np.isfinite(pitches[:frames])
    if not sung.any():
        return Coherence(harmony=None, in_key=None)
    classes = np.round(pitches[:frames][sung]).astype(int) % 12
    energy = np.square(chroma[:frames][sung])
    total = energy.sum(axis=1)
    share = energy[np.arange(len(classes)), classes] / np.maximum(total, 1e-12)
    harmony = float(12 * np.where(total > 1e-9, share, 0.0).mean())
    energy = np.square(chroma)
    total = energy.sum(axis=1, keepdims=True)
    heard = total[:, 0] > 1e-9  # every sounding frame counts alike
    key = estimate_key(energy[heard] / total[heard]) if heard.any() else None
    in_key = float(np.isin(classes, sorted(key.scale)).mean()) if key is not None else None
    return Coherence(harmony=harmony, in_key=in_key)
