"""Whether a band that is asked for a meter plays in it: where in the bar its onsets are, by the score reader.

Run on a corpus of songs in the meters in question, such as popband's with --beats-per-bar 3. How strongly
onsets repeat once a bar, twice, ... is the Fourier series of their strength over the bar: a band in three is
strong at multiples of three, one that plays four beats in the time of a bar of three at multiples of four.
"""

from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.accompany.pipeline import Accompanist, Sketches
from duotok.recipes.accompany.request import METER_NAMES
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.music.score_reader import STEM_COLUMNS

_PARTS_OF_BAR = 48  # divides by 2, 3, 4 and 6
_HARMONICS = np.arange(1, 12)  # 12 a bar are in three as well as in four
_MOST_BEATS = 8  # of a bar, that are looked for


def fold_onsets(
    onsets: np.ndarray, rate_hz: float, bar_lines_seconds: Sequence[float] | np.ndarray
) -> np.ndarray:
    """Mean onset strength [_PARTS_OF_BAR] by the place in the bar, of frames [frames] between bar lines."""
    sums, counts = np.zeros(_PARTS_OF_BAR), np.zeros(_PARTS_OF_BAR)
    times = (np.arange(len(onsets)) + 0.5) / rate_hz
    for start, stop in pairwise(bar_lines_seconds):
        inside = (times >= start) & (times < stop)
        places = ((times[inside] - start) / (stop - start) * _PARTS_OF_BAR).astype(int)
        np.add.at(sums, places, onsets[inside])
        np.add.at(counts, places, 1)
    return sums / np.maximum(counts, 1)


def pulse_shares(folded: np.ndarray) -> dict[int, float]:
    """Which share of what repeats within the bar is at multiples of 2, 3, ... beats; 0 where nothing does."""
    power = np.abs(np.fft.rfft(folded - folded.mean()))[_HARMONICS] ** 2
    total = max(float(power.sum()), 1e-12)
    return {beats: float(power[_HARMONICS % beats == 0].sum()) / total for beats in range(2, _MOST_BEATS + 1)}


@torch.no_grad()
def measure_meter(settings: Settings) -> dict[str, float]:
    """Mean pulse shares of songs in B beats by stem: in_B_STEM_at_N, and of the corpus' own bands true_...

    in_B_kept: share of the songs in whose onsets together B beats are stronger than any other number that
    neither divides B nor is a multiple of it. The meter is asked for; bars and tempo are read.
    """
    accompanist = Accompanist.from_pretrained(settings.bundle)
    reader, tokenizer = accompanist.bundle.score_reader, accompanist.bundle.tokenizer
    if reader is None:
        raise ConfigError("meter needs a bundle with a score reader, by which onsets are heard")
    shares: dict[str, list[float]] = defaultdict(list)

    def listen(codes: Tensor, bar_lines: Sequence[float] | np.ndarray, beats: int, whose: str) -> None:
        onsets = reader.listen(tokenizer.features(codes[None], "accompaniment")[0])["onset"]
        together = np.zeros(_PARTS_OF_BAR)
        for stem, columns in STEM_COLUMNS.items():
            folded = fold_onsets(onsets[:, columns].max(axis=1), reader.rate_hz, bar_lines)
            together += folded / max(folded.max(), 1e-6)
            for other, share in pulse_shares(folded).items():
                if other in METER_NAMES:
                    shares[f"{whose}in_{beats}_{stem}_at_{other}"].append(share)
        found = pulse_shares(together)
        rivals = [share for other, share in found.items() if other % beats and beats % other]
        shares[f"{whose}in_{beats}_kept"].append(float(found[beats] > max(rivals)))

    excerpts = excerpts_of(settings, 48, 20.0)
    for number, excerpt in enumerate(tqdm(excerpts, desc="meter", disable=None)):
        beats = excerpt.item.beats_per_bar
        sketch = accompanist.compose(
            excerpt.read("vocal"), seed=settings.seed + number, meter=METER_NAMES[beats]
        )
        assert isinstance(sketch, Sketches)
        if sketch.plan is None:
            raise ConfigError("meter needs a model that plays from a lead sheet")
        line = sketch.plan.time_line
        listen(sketch.ranked[0].codes, line.bar_lines / line.rate_hz, beats, "")
        true = tokenizer.encode(excerpt.read("accompaniment")[None], "accompaniment")[0]
        listen(true, excerpt.downbeats_seconds, beats, "true_")
    return {"excerpts": len(excerpts), **{name: float(np.mean(each)) for name, each in shares.items()}}
