"""Loudness (ITU-R BS.1770-4).

Measured in blocks of a few seconds, so an hour needs no more working memory than a minute.
"""

import math

import numpy as np
from scipy.signal import lfilter
from torch import Tensor

from .audio import SAMPLE_RATE_HZ
from .long_waves import let_go

# K-weighting at 48 kHz: BS.1770-4, tables 1 and 2 (high shelf, then high pass).
_SHELF = ([1.53512485958697, -2.69169618940638, 1.19839281085285], [1.0, -1.69065929318241, 0.73248077421585])
_HIGH_PASS = ([1.0, -2.0, 1.0], [1.0, -1.99004745483398, 0.99007225036621])
K_WEIGHTING = (_SHELF, _HIGH_PASS)  # (numerator, denominator) of each biquad
_STEP_SAMPLES = SAMPLE_RATE_HZ // 10  # gating blocks of 400 ms start every 100 ms
_CHUNK_SAMPLES = 100 * _STEP_SAMPLES
_ABSOLUTE_GATE_LUFS = -70.0
_RELATIVE_GATE_DB = 10.0


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


def _k_weighted_steps(wave: Tensor) -> np.ndarray:
    """Energy of the K-weighted wave, summed over channels, per 100 ms step [steps]; the last may be short."""
    channels, samples = wave.shape
    state = np.zeros((2, channels, 2))
    energies = []
    for start in range(0, samples, _CHUNK_SAMPLES):
        chunk = wave[:, start : start + _CHUNK_SAMPLES].double().cpu().numpy()
        let_go(wave)
        for stage, (b, a) in enumerate(K_WEIGHTING):
            chunk, state[stage] = lfilter(b, a, chunk, axis=-1, zi=state[stage])
        power = np.square(chunk).sum(axis=0)
        energies.append(np.add.reduceat(power, np.arange(0, len(power), _STEP_SAMPLES)))
    return np.concatenate(energies) if energies else np.zeros(0)


def _to_lufs(power: float) -> float:
    return -0.691 + 10 * math.log10(power) if power > 1e-20 else -math.inf


def _to_power(lufs: float) -> float:
    return 10 ** ((lufs + 0.691) / 10)
