"""How much longer contexts help the language model (P 6.2, figure 4).

Two readings of cnBPT by length: over whole windows of that length (all pieces of it that cover the test
windows), as the paper's protocol has it, and over the same last frames of the test windows with only that
much of the song before and in them, so that nothing but the context changes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.lm.metrics import codebook_normalized_bits, nats_to_bits, relative_gain_percent, rising_share
from duotok.recipes.evaluation.diagnosis import Windows

LENGTHS_SECONDS = (5.0, 10.0, 20.0, 30.0)
PREFIX_SECONDS = 2.0  # given and not counted, track to track only
# P tables 2 and 3: DuoTok at 30 s.
PAPER_CNBPT = {
    "unconditional_vocal": 0.461,
    "unconditional_accompaniment": 0.506,
    "vocal_to_accompaniment": 0.464,
}


@dataclass(frozen=True, kw_only=True)
class ContextScaling:
    """cnBPT by series ("unconditional_vocal", "vocal_to_accompaniment", ...) and context in seconds."""

    whole: Mapping[str, Mapping[float, float]]
    last: Mapping[str, Mapping[float, float]]
    last_seconds: float  # how many seconds at the windows' end `last` counts
    windows: int

    def figures(self) -> dict[str, float]:
        """Flat figures: both curves, how far they fall, at how many of their steps.

        gain: by how many percent the longest context lowers cnBPT, of the same frames and (gain_whole) of
        whole windows; falling share: 1 = every longer context is better than the one before.
        """
        found: dict[str, float] = {"windows": self.windows, "last_seconds": self.last_seconds}
        for curves, suffix, gain in ((self.whole, "", "gain_whole"), (self.last, "_same_frames", "gain")):
            for name, curve in curves.items():
                values = [curve[seconds] for seconds in sorted(curve)]
                found |= {f"cnbpt_{name}{suffix}_{seconds:g}s": curve[seconds] for seconds in sorted(curve)}
                found[f"{gain}_{name}_percent"] = relative_gain_percent(values[-1], values[0])
                if len(values) > 1:
                    found[f"falling_share_{name}{suffix}"] = rising_share([-value for value in values])
        return found


def measure_context(
    lm: DualTrackLM,
    windows: Windows,
    lengths_seconds: Sequence[float] = LENGTHS_SECONDS,
    modes: Sequence[str] = tuple(MODES),
) -> ContextScaling:
    """Score the windows with contexts of every length that fits into them."""
    lengths = sorted({length for length in lengths_seconds if length < windows.seconds} | {windows.seconds})
    prefix = round(PREFIX_SECONDS * windows.rate_hz)
    last = max(1, round(lengths[0] * windows.rate_hz) - prefix)  # what the shortest context can count
    whole: dict[str, dict[float, float]] = {}
    same: dict[str, dict[float, float]] = {}
    runs = [(mode, length) for mode in modes for length in lengths]
    for mode, length in tqdm(runs, desc="context", disable=None):
        pieces, ends = cut_pieces(windows.codes, round(length * windows.rate_hz))
        scores = score_batch(lm, pieces["vocal"], pieces["accompaniment"], mode)
        skipped = 0 if mode == "unconditional" else prefix
        for track, nats in scores.loss_nats.items():
            name = f"unconditional_{track}" if mode == "unconditional" else mode
            size = lm.codes_of(track).codes
            whole.setdefault(name, {})[length] = _cnbpt(nats[:, skipped:], size)
            same.setdefault(name, {})[length] = _cnbpt(nats[ends, -last:], size)
    return ContextScaling(
        whole=whole, last=same, last_seconds=last / windows.rate_hz, windows=len(windows.codes["vocal"])
    )


def cut_pieces(codes: Mapping[str, Tensor], frames: int) -> tuple[dict[str, Tensor], Tensor]:
    """Cut windows into pieces that cover them, overlapping where the length does not divide them.

    codes: by track, each [windows, all frames] -> by track, each [pieces, frames], and which of the pieces
    are the windows' ends, [windows] int64.
    """
    count, total = codes["vocal"].shape
    starts = np.linspace(0, total - frames, math.ceil(total / frames)).round().astype(int).tolist()
    pieces = {
        track: torch.cat([rows[:, start : start + frames] for start in starts])
        for track, rows in codes.items()
    }
    return pieces, torch.arange(count) + count * (len(starts) - 1)


def _cnbpt(nats: Tensor, codes: int) -> float:
    return codebook_normalized_bits(nats_to_bits(nats.double().mean().item()), [codes])
