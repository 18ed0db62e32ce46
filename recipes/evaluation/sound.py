"""Simple facts about a produced sound: peak, silent stretches, stereo width, loudness against the vocal."""

import math

from torch import Tensor
from torch.nn import functional

from duotok.recipes.loudness import measure_loudness
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

_BLOCK_SAMPLES = SAMPLE_RATE_HZ // 20
_MONO_DB = -60.0  # a side this far below the middle is none
_FAR_BELOW_DB = 120.0  # what the difference to silence is set to


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


def stereo_width_db(wave: Tensor) -> float:
    """Energy of the side (left - right) over that of the middle (left + right), in dB within -60..60.

    wave: [2, samples]; 0 is two unrelated channels of one level, -60 is mono or silence.
    """
    middle, side = (float((wave[0] + sign * wave[1]).double().square().sum()) for sign in (1, -1))
    if side <= 0:
        return _MONO_DB
    return max(_MONO_DB, min(-_MONO_DB, 10 * math.log10(side / max(middle, 1e-30))))


def loudness_difference_lu(wave: Tensor, reference: Tensor) -> float:
    """How much louder wave is than the reference, in LU (BS.1770); -120 or 120 where one is silent."""
    level, base = measure_loudness(wave), measure_loudness(reference)
    if math.isinf(level) and math.isinf(base):
        return 0.0
    return max(-_FAR_BELOW_DB, min(_FAR_BELOW_DB, level - base))
