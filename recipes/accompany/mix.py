"""Loudness (ITU-R BS.1770-4) and the mix of a vocal with its accompaniment.

Measured in blocks of a few seconds, so an hour needs no more working memory than a minute.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.signal import lfilter
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

PEAK_LIMIT = 0.98  # largest sample magnitude that is written; 1.0 is full scale

# K-weighting at 48 kHz: BS.1770-4, tables 1 and 2 (high shelf, then high pass).
_SHELF = ([1.53512485958697, -2.69169618940638, 1.19839281085285], [1.0, -1.69065929318241, 0.73248077421585])
_HIGH_PASS = ([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621])
K_WEIGHTING = (_SHELF, _HIGH_PASS)  # (numerator, denominator) of each biquad
_STEP_SAMPLES = SAMPLE_RATE_HZ // 10  # gating blocks of 400 ms start every 100 ms
_CHUNK_SAMPLES = 100 * _STEP_SAMPLES
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_DB = 10.0
_FADE_SECONDS = 0.25  # about how long a played note takes to die away


def match_level(found: Tensor, reference: Tensor) -> Tensor:
    """found with the power of the reference, for codes do not know a recording's level; silence stays."""
    return found * (reference.square().mean() / found.square().mean().clamp_min(1e-12)).sqrt()


@dataclass(frozen=True, kw_only=True)
class Mixdown:
    """A vocal and an accompaniment brought together."""

    # [2, samples], levelled to fit under the vocal as it was given, faded at its end, peak <= PEAK_LIMIT
    accompaniment: Tensor
    mix: Tensor  # [2, samples], peak <= PEAK_LIMIT
    vocal_lufs: float
    accompaniment_lufs: float  # of `accompaniment`, before the fade
    mix_gain_db: float  # common gain of both tracks in the mix; 0 unless the sum would clip


def measure_loudness(wave: Tensor) -> float:
    """Integrated loudness in LUFS of wave [channels, samples] at 48 kHz (BS.1770-4; -inf for silence).

    Shorter than one gating block of 0.4 s, or nothing above the gates: ungated K-weighted level.
    """
    steps = _k_weighted_steps(wave)
    if len(steps) < 4:
        total = float(steps.sum())
        return _to_lufs(total / max(wave.shape[-1], 1))
    cumulative = np.concatenate([[0.0], np.cumsum(steps)])
    whole = wave.shape[-1] // _STEP_SAMPLES  # the incomplete last step is in no block
    blocks = (cumulative[4 : whole + 1] - cumulative[: whole - 3]) / (4 * _STEP_SAMPLES)
    gated = blocks[blocks > _to_power(_ABSOLUTE_GATE_LUFS)]
    if gated.size == 0:
        return _to_lufs(float(cumulative[-1]) / wave.shape[-1])
    gated = gated[gated > gated.mean() * 10 ** (-_RELATIVE_GATE_DB / 10)]
    return _to_lufs(float(gated.mean()))


def mix_down(vocal: Tensor, accompaniment: Tensor, *, accompaniment_db: float) -> Mixdown:
    """Set the accompaniment accompaniment_db above the vocal's loudness and add both.

    vocal, accompaniment: [2, samples] at 48 kHz; accompaniment may be silent and is then left as it is.
    The accompaniment fades in its last quarter of a second, for the recording's end cuts its notes off.
    Peaks are held by gain alone, never by clipping: the mix by one gain for both tracks.
    """
    vocal_lufs = measure_loudness(vocal)
    level, gain_db = measure_loudness(accompaniment), 0.0
    if math.isfinite(level) and math.isfinite(vocal_lufs):
        gain_db = vocal_lufs + accompaniment_db - level
        level += gain_db
    accompaniment = accompaniment * 10 ** (gain_db / 20)
    _fade_end(accompaniment)
    mix = vocal + accompaniment
    mix_gain = _peak_gain(mix)
    own_gain = _peak_gain(accompaniment)
    return Mixdown(
        accompaniment=accompaniment.mul_(own_gain),
        mix=mix.mul_(mix_gain),
        vocal_lufs=vocal_lufs,
        accompaniment_lufs=level + 20 * math.log10(own_gain),
        mix_gain_db=20 * math.log10(mix_gain),
    )


def _fade_end(wave: Tensor) -> None:
    """Let the last 0.25 s of wave [channels, samples] fall to nothing along half a cosine, in place."""
    samples = min(wave.shape[-1], round(_FADE_SECONDS * SAMPLE_RATE_HZ))
    angles = torch.linspace(0, math.pi, samples + 1, dtype=torch.float64)[1:]
    wave[:, wave.shape[-1] - samples :] *= (0.5 + 0.5 * angles.cos()).to(wave)


def _peak_gain(wave: Tensor) -> float:
    peak = max(float(wave.max()), -float(wave.min())) if wave.numel() else 0.0
    return min(1.0, PEAK_LIMIT / peak) if peak > 0 else 1.0


def _k_weighted_steps(wave: Tensor) -> np.ndarray:
    """Energy of the K-weighted wave, summed over channels, per 100 ms step [steps]; the last may be short."""
    channels, samples = wave.shape
    state = np.zeros((2, channels, 2))
    energies = []
    for start in range(0, samples, _CHUNK_SAMPLES):
        chunk = wave[:, start : start + _CHUNK_SAMPLES].double().cpu().numpy()
        for stage, (b, a) in enumerate(K_WEIGHTING):
            chunk, state[stage] = lfilter(b, a, chunk, axis=-1, zi=state[stage])
        power = np.square(chunk).sum(axis=0)
        energies.append(np.add.reduceat(power, np.arange(0, len(power), _STEP_SAMPLES)))
    return np.concatenate(energies) if energies else np.zeros(0)


def _to_lufs(power: float) -> float:
    return -0.691 + 10 * math.log10(power) if power > 1e-20 else -math.inf


def _to_power(lufs: float) -> float:
    return 10 ** ((lufs + 0.691) / 10)
