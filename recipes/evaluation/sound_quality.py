"""How near a rendered sound is to the recording it was made of, as named figures. Needs librosa."""

from typing import NamedTuple

import torch
from torch import Tensor

from duotok.recipes.accompany.mix import match_level
from duotok.recipes.evaluation.audio_metrics import compare_spectra
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.spectra import LogMel


class Measure(NamedTuple):
    """One figure of quality."""

    name: str
    label: str
    higher_is_better: bool


MEASURES = (
    Measure("chroma_correlation", "chroma correlation", True),
    Measure("fine_structure_50_300_hz", "fine structure 50-300 Hz", True),
    Measure("fine_structure_300_1000_hz", "fine structure 300-1000 Hz", True),
    Measure("fine_structure_1000_3000_hz", "fine structure 1000-3000 Hz", True),
    Measure("log10_mel_l1", "log10-mel L1", False),
)
# Not a distance: how much the levels of the mel bands move, over how much the recording's do. 1 is as lively
# as the recording; a sound that is the mean of all that could be stays below.
LIVELINESS = "mel_movement"


def measure_quality(wave: Tensor, found: Tensor) -> dict[str, float]:
    """Compare found with the recording wave, both [2, samples] at 48 kHz, at equal loudness (RMS).

    Codes do not know the recording's level. Returns the figures of MEASURES and LIVELINESS.
    """
    found = match_level(found, wave)
    return compare_spectra(wave, found) | {LIVELINESS: _movement(found) / max(_movement(wave), 1e-6)}


def worst_loss_percent(figures: dict[str, float], reference: dict[str, float]) -> float:
    """How much worse than the reference the worst of MEASURES is, in percent; below 0 all are better."""
    losses = []
    for measure in MEASURES:
        change = figures[measure.name] - reference[measure.name]
        worse = -change if measure.higher_is_better else change
        losses.append(100 * worse / max(abs(reference[measure.name]), 1e-6))
    return max(losses)


def _movement(wave: Tensor) -> float:
    """Mean over mel bands of the deviation in time of the log10 level, every 10 ms."""
    mel = LogMel(64)
    mono = wave.detach().float().cpu().mean(dim=0, keepdim=True)
    mono = torch.nn.functional.pad(mono, (0, -mono.shape[1] % (SAMPLE_RATE_HZ // 100)))
    return float(mel(mono)[0].std(dim=0).mean())
