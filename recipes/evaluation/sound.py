"""Simple facts about a produced sound: peak, silent stretches, stereo width, loudness beside another."""

import math

from torch import Tensor
from torch.nn import functional

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.loudness import measure_loudness

_BLOCK_SAMPLES = SAMPLE_RATE_HZ // 20
_FAR_BELOW_DB = 120.0  # what the difference to silence is set to
_NARROWEST_DB = -40.0  # of side over mid, below which nobody hears a side


def measure_peak(wave: Tensor) -> float:
    """Largest sample magnitude; 1.0 is full scale. wave: [channels, samples]."""
    return float(wave.abs().max()) if wave.numel() else 0.0


def longest_silence_seconds(wave: Tensor, *, threshold_db: float = -60.0) -> float:
    """Length of the longest stretch whose level stays below threshold_db (dBFS RMS in blocks of 50 ms).

    wave: [channels, samples] at 48 kHz.
    """
    power = wave.float().square().mean(dim=0)
    padded = functional.pad(power, (0, -len(power) % _BLOCK_SAMPLES))
    blocks = padded.unflatten(0, (-1, _BLOCK_SAMPLES)).mean(dim=1)
    longest = current = 0
    for silent in (blocks < 10 ** (threshold_db / 10)).tolist():
        current = current + 1 if silent else 0
        longest = max(longest, current)
    return longest * _BLOCK_SAMPLES / SAMPLE_RATE_HZ


def loudness_difference_lu(wave: Tensor, reference: Tensor) -> float:
    """How much louder wave is than the reference, in LU (BS.1770); -120 or 120 where one is silent."""
    level, base = measure_loudness(wave), measure_loudness(reference)
    if math.isinf(level) and math.isinf(base):
        return 0.0
    return max(-_FAR_BELOW_DB, min(_FAR_BELOW_DB, level - base))


def stereo_width_db(wave: Tensor) -> float:
    """Energy of the side over that of the mid channel in dB, from -40 (mono, or silent) to 40.

    wave: [2, samples].
    """
    left, right = wave.double()
    mid, side = float((left + right).square().sum()), float((left - right).square().sum())
    if max(mid, side) == 0:
        return _NARROWEST_DB
    ratio_db = 10 * math.log10(max(side, 1e-30) / max(mid, 1e-30))
    return max(_NARROWEST_DB, min(-_NARROWEST_DB, ratio_db))
