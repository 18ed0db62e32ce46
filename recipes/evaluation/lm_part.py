"""Figures of the language model under teacher forcing: how predictable codes are, what the vocal is worth.

The paper's protocol (P B.1): windows of 30 s; unconditional over both tracks; track to track with the first
2 s of the target given and not counted. Without a prefix the vocal matters most, so that is measured as well.
`diagnose` draws the same and has the full curves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import Scores, mask_source, score_batch, shift_source
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.recipes.evaluation.heard_coherence import pair_with_others
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

PREFIX_SECONDS = 2.0  # given and not counted, track to track only (P B.1.4)
RANKS = (1, 5, 10, 50)
_INTO = "vocal_to_accompaniment"
# P tables 2, 3, 5 and 6: DuoTok of 2 x 32,768 codes under a model of 1B.
PAPER = {
    "cnbpt_unconditional_vocal": 0.461,
    "cnbpt_unconditional_accompaniment": 0.506,
    "cnbpt_vocal_to_accompaniment": 0.464,
    "enbpt_unconditional_vocal": 0.501,
    "enbpt_unconditional_accompaniment": 0.533,
    "enbpt_vocal_to_accompaniment": 0.489,
    "acc_at_1_unconditional_vocal": 0.14,
    "acc_at_10_unconditional_vocal": 0.43,
    "acc_at_50_unconditional_vocal": 0.67,
    "acc_at_1_unconditional_accompaniment": 0.11,
    "acc_at_10_unconditional_accompaniment": 0.36,
    "acc_at_50_unconditional_accompaniment": 0.61,
    "acc_at_1_vocal_to_accompaniment": 0.13,
    "acc_at_10_vocal_to_accompaniment": 0.41,
    "acc_at_50_vocal_to_accompaniment": 0.66,
}
LENGTHS_SECONDS = (5.0, 10.0, 20.0, 30.0)
_START_SECONDS = 5.0
# Damages by rising severity; those of a whole window or more are left out.
SHIFTS_SECONDS = {"shift_40ms": 0.04, "shift_200ms": 0.2, "shift_1s": 1.0, "shift_4s": 4.0}
MASK_SHARES = {"mask_quarter": 0.25, "mask_half": 0.5, "mask_three_quarters": 0.75, "no_vocal": 1.0}


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Test windows of one length, one per item, of as many songs as possible."""

    codes: dict[str, Tensor]  # by track, each [windows, frames]
    partners: list[int]  # for every window one of another song
    rate_hz: float

    @property
    def count(self) -> int:
        """Number of windows."""
        return len(self.partners)

    @property
    def seconds(self) -> float:
        """Length of each window."""
        return self.codes["vocal"].shape[1] / self.rate_hz


@dataclass(frozen=True, kw_only=True)
class Predictability:
    """The figures of some windows, named as in `describe_predictability`."""

    values: Mapping[str, float]
    windows: int
    seconds: float

    def figures(self) -> dict[str, float]:
        """Flat figures."""
        return {**self.values, "windows": self.windows, "window_seconds": self.seconds}


def measure_predictability(lm: DualTrackLM, windows: Windows) -> Predictability:
    """Score the windows in every mode."""
    vocal, accompaniment = (windows.codes[track] for track in TRACKS)
    scores = {
        mode: score_batch(lm, vocal, accompaniment, mode)
        for mode in tqdm(MODES, desc="predictability", disable=None)
    }
    sizes = {track: lm.codes_of(track).codes for track in TRACKS}
    return Predictability(
        values=describe_predictability(scores, windows.codes, sizes, windows.rate_hz),
        windows=windows.count,
        seconds=windows.seconds,
    )


def describe_predictability(
    scores: Mapping[str, Scores], codes: Mapping[str, Tensor], sizes: Mapping[str, int], rate_hz: float
) -> dict[str, float]:
    """Figures of all modes from their scores without a prefix.

    By track and mode BPT, cnBPT, enBPT, Acc@k; averages of both tracks (table 2); tokens, index bits,
    cross-entropy bits and cnBPS per second (table 6); codes' entropy and utilization (table 11); by how much
    the vocal lowers the accompaniment's loss.
    """
    figures: dict[str, float] = {}
    prefix = round(PREFIX_SECONDS * rate_hz)
    for track in TRACKS:
        counts = metrics.code_counts(codes[track], sizes[track])
        figures[f"unigram_bits_{track}"] = metrics.unigram_entropy_bits(counts)
        figures[f"normalized_entropy_{track}"] = metrics.normalized_entropy(counts)
        figures[f"utilization_{track}"] = metrics.utilization(counts)
    runs = [(f"unconditional_{track}", scores["unconditional"], track) for track in TRACKS]
    for mode in (mode for mode in scores if MODES.get(mode, (None,))[0] is not None):
        (track,) = MODES[mode][1]
        runs.append((mode, after_prefix(scores[mode], prefix), track))
    for name, score, track in runs:
        bits = score.bits_per_token(track)
        figures |= {
            f"bpt_{name}": bits,
            f"cnbpt_{name}": metrics.codebook_normalized_bits(bits, [sizes[track]]),
            f"enbpt_{name}": metrics.entropy_normalized_bits(bits, figures[f"unigram_bits_{track}"]),
        }
        figures |= {f"acc_at_{k}_{name}": score.accuracy_at(track, k) for k in RANKS}
    figures |= _averages_and_rates(figures, sizes, rate_hz)
    paired = after_prefix(scores[_INTO], prefix).bits_per_token("accompaniment")
    alone = scores["unconditional"]
    figures["conditional_gain_percent"] = metrics.relative_gain_percent(
        paired, alone.bits_per_token("accompaniment")
    )
    figures["conditional_gain_same_frames_percent"] = metrics.relative_gain_percent(
        paired, after_prefix(alone, prefix).bits_per_token("accompaniment")
    )
    return figures


def after_prefix(scores: Scores, prefix_frames: int) -> Scores:
    """The same scores with the first frames given, not counted: teacher forcing makes no other difference."""
    return Scores(loss_nats=scores.loss_nats, ranks=scores.ranks, prefix_frames=prefix_frames)


def _averages_and_rates(
    figures: Mapping[str, float], sizes: Mapping[str, int], rate_hz: float
) -> dict[str, float]:
    """The unconditional mode over both tracks, per token and per second."""
    names = [f"unconditional_{track}" for track in TRACKS]
    bits = [figures[f"bpt_{name}"] for name in names]
    rates = [metrics.token_rate_hz(rate_hz, 1)] * len(TRACKS)
    index_rates = {track: metrics.index_bit_rate(rate_hz, [sizes[track]]) for track in TRACKS}
    return {
        "bpt_unconditional_average": sum(bits) / len(bits),
        "cnbpt_unconditional_average": metrics.codebook_normalized_bits(bits, list(sizes.values())),
        "enbpt_unconditional_average": sum(figures[f"enbpt_{name}"] for name in names) / len(names),
        "token_rate_hz": sum(rates),
        **{f"index_kbps_{track}": rate / 1000 for track, rate in index_rates.items()},
        "index_kbps": sum(index_rates.values()) / 1000,
        "model_kbps_unconditional": metrics.cross_entropy_rate(bits, rates) / 1000,
        "cnbps_unconditional": metrics.codebook_normalized_rate(
            [figures[f"cnbpt_{name}"] for name in names], rates
        ),
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
                found[f"{gain}_{name}_percent"] = metrics.relative_gain_percent(values[-1], values[0])
                if len(values) > 1:
                    found[f"falling_share_{name}{suffix}"] = metrics.rising_share(
                        [-value for value in values]
                    )
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
    return metrics.codebook_normalized_bits(metrics.nats_to_bits(nats.double().mean().item()), [codes])


def measure_lm(settings: Settings) -> dict[str, float]:
    """cnBPT, enBPT, Acc@k, rates by mode; what another song's, a shifted, a hidden vocal costs; context."""
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    lm = DualTrackLM.from_pretrained(settings.bundle / "lm")
    if lm.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the tokenizer in {settings.bundle} is not the one its language model learned from"
        )
    excerpts = excerpts_of(settings, 48, 30.0)
    rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    for excerpt in tqdm(excerpts, desc="lm: codes", disable=None):
        for track in TRACKS:
            rows[track].append(tokenizer.encode(excerpt.read(track)[None], track)[0])
    codes = {track: torch.stack(parts) for track, parts in rows.items()}  # [windows, frames]
    partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
    figures = measure_codes(lm, codes, partners, tokenizer.frame_rate_hz, settings.seed)
    windows = Windows(codes=codes, partners=partners, rate_hz=tokenizer.frame_rate_hz)
    context = measure_context(lm, windows, modes=("unconditional", _INTO)).figures()  # P 6.2
    figures |= {
        f"context_{name}": context[name] for name in context if name not in ("windows", "last_seconds")
    }
    return figures | {"windows": len(excerpts), "window_seconds": excerpts[0].seconds}


def measure_codes(
    lm: DualTrackLM, codes: dict[str, Tensor], partners: list[int], rate_hz: float, seed: int
) -> dict[str, float]:
    """Predictability and costs of codes {"vocal", "accompaniment"}, each [windows, frames].

    partners: for every window one of another song.
    """
    vocal, accompaniment = codes["vocal"], codes["accompaniment"]
    pad = lm.pads["vocal"]
    shifts = {
        name: shift_source(vocal, round(seconds * rate_hz))
        for name, seconds in SHIFTS_SECONDS.items()
        if round(seconds * rate_hz) < vocal.shape[1]
    }
    masks = {
        # The same draw for every share: what a small share hides, a larger one hides as well.
        name: mask_source(vocal, share, pad, torch.Generator().manual_seed(seed))
        for name, share in MASK_SHARES.items()
    }
    # name -> (mode, the vocal that is shown)
    runs = {mode: (mode, vocal) for mode in ("unconditional", _INTO, "accompaniment_to_vocal")}
    damaged = {"mismatch": vocal[partners], **shifts, **masks}
    runs |= {name: (_INTO, shown) for name, shown in damaged.items()}
    scores = {
        name: score_batch(lm, shown, accompaniment, mode)
        for name, (mode, shown) in tqdm(runs.items(), desc="lm: scores", disable=None)
    }
    sizes = {track: lm.codes_of(track).codes for track in TRACKS}
    figures = describe_predictability(scores, codes, sizes, rate_hz)
    start = round(_START_SECONDS * rate_hz)
    for name, first in (("no_prefix", None), ("first_5s", start)):
        bits = scores[_INTO].bits_per_token("accompaniment", first)
        figures[f"cnbpt_{_INTO}_{name}"] = metrics.codebook_normalized_bits(bits, [sizes["accompaniment"]])
    costs = {name: _costs(scores[name], scores[_INTO], rate_hz) for name in damaged}
    for name, by_scope in costs.items():
        figures |= {f"{name}_cost{suffix}_percent": value for suffix, value in by_scope.items()}
    for kind, names in (("shift", shifts), ("mask", masks)):
        for suffix in ("", "_first_5s"):
            figures |= severity_figures(kind, suffix, [costs[name][suffix] for name in names])
    return figures


def severity_figures(kind: str, suffix: str, percents: Sequence[float]) -> dict[str, float]:
    """What costs by rising severity come to.

    The least; how much more the severest costs than the mildest; the share of the steps at which they rise,
    which stays below 1 where costs saturate, as those of shifts do in the paper.
    """
    if not percents:
        return {}
    found = {f"{kind}_cost_least{suffix}_percent": min(percents)}
    if len(percents) > 1:
        found[f"{kind}_cost_rise{suffix}_percent"] = percents[-1] - percents[0]
        found[f"{kind}_cost_rising_share{suffix}"] = metrics.rising_share(percents)
    return found


def _costs(damaged: Scores, intact: Scores, rate_hz: float) -> dict[str, float]:
    """Percent by the suffix of the figure: the paper's protocol, whole windows, their first 5 s (P eq. 8)."""
    prefix, start = round(PREFIX_SECONDS * rate_hz), round(_START_SECONDS * rate_hz)
    return {
        "": _cost(after_prefix(damaged, prefix), after_prefix(intact, prefix)),
        "_no_prefix": _cost(damaged, intact),
        "_first_5s": _cost(damaged, intact, start),
    }


def _cost(damaged: Scores, intact: Scores, first_frames: int | None = None) -> float:
    bits = (scores.bits_per_token("accompaniment", first_frames) for scores in (damaged, intact))
    return metrics.corruption_cost_percent(*bits)
