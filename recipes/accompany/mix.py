"""The mix of a vocal with its accompaniment: level, end and peaks."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.long_waves import amplify, map_blocks, peak
from duotok.tokenizer.common.loudness import measure_loudness

PEAK_LIMIT = 0.98  # largest sample magnitude that is written; 1.0 is full scale
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
    gain = 10 ** (gain_db / 20)
    accompaniment = map_blocks(lambda band: band * gain, accompaniment)
    _fade_end(accompaniment)
    mix = map_blocks(torch.add, vocal, accompaniment)
    mix_gain = _peak_gain(mix)
    own_gain = _peak_gain(accompaniment)
    return Mixdown(
        accompaniment=amplify(accompaniment, own_gain),
        mix=amplify(mix, mix_gain),
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
    highest = peak(wave)
    return min(1.0, PEAK_LIMIT / highest) if highest > 0 else 1.0
