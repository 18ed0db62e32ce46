"""Figures of the language model under teacher forcing: how predictable codes are, what the vocal is worth.

The paper's protocol (P B.1): windows of 30 s; unconditional over both tracks; track to track with the first
2 s of the target given and not counted. Without a prefix the vocal matters most, so that is measured as well.
`research.diagnose` draws them, with finer curves.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import Scores, mask_source, score_batch, shift_source
from duotok.recipes.evaluation.excerpts import Excerpt, Settings, excerpts_of
from duotok.recipes.evaluation.heard_coherence import pair_with_others
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

PREFIX_SECONDS = 2.0  # given and not counted, track to track only (P B.1.4)
RANKS = (1, 5, 10, 50)
LENGTHS_SECONDS = (5.0, 10.0, 20.0, 30.0)
_INTO = "vocal_to_accompaniment"
_START_SECONDS = 5.0
# Damages by rising severity; those of a whole window or more are left out.
_SHIFTS_SECONDS = {"shift_40ms": 0.04, "shift_200ms": 0.2, "shift_1s": 1.0, "shift_4s": 4.0}
_MASK_SHARES = {"mask_quarter": 0.25, "mask_half": 0.5, "mask_three_quarters": 0.75, "no_vocal": 1.0}


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Windows of one length, one per item, of as many songs as possible."""

    codes: dict[str, Tensor]  # by track, each [windows, frames]
    partners: list[int]  # for every window one of another song
    rate_hz: float

    @property
    def seconds(self) -> float:
        """Length of each window."""
        return self.codes["vocal"].shape[1] / self.rate_hz

    @property
    def size(self) -> dict[str, float]:
        """How many there are of how many seconds, as figures."""
        return {"windows": len(self.partners), "window_seconds": self.seconds}


def encode_windows(excerpts: Sequence[Excerpt], tokenizer: DuoTokenizer) -> Windows:
    """The codes of excerpts of one length."""
    device = next(tokenizer.parameters()).device
    rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    for excerpt in tqdm(excerpts, desc="lm: codes", disable=None):
        for track in TRACKS:
            rows[track].append(tokenizer.encode(excerpt.read(track)[None].to(device), track)[0].cpu())
    return Windows(
        codes={track: torch.stack(parts) for track, parts in rows.items()},
        partners=pair_with_others([excerpt.item.song for excerpt in excerpts]),
        rate_hz=tokenizer.frame_rate_hz,
    )


def open_matching_lm(folder: Path, tokenizer: DuoTokenizer) -> DualTrackLM:
    """The language model in a folder; raises CheckpointError where it learned from another tokenizer."""
    lm = DualTrackLM.from_pretrained(folder)
    if lm.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the language model in {folder} learned from the tokenizer {lm.tokenizer_fingerprint}, "
            f"not {tokenizer.fingerprint}"
        )
    return lm


def measure_lm(settings: Settings) -> dict[str, float]:
    """cnBPT, enBPT, Acc@k, rates by mode; what another song's, a shifted, a hidden vocal costs; context."""
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    lm = open_matching_lm(settings.bundle / "lm", tokenizer)
    windows = encode_windows(excerpts_of(settings, 48, 30.0), tokenizer)
    figures = measure_predictability(lm, windows)
    costs = measure_costs(lm, windows, _SHIFTS_SECONDS, _MASK_SHARES, settings.seed)
    figures |= {name: value for name, value in costs.items() if not name.endswith("_error_percent")}
    context = measure_context(lm, windows, modes=("unconditional", _INTO))  # P 6.2
    return figures | {f"context_{name}": value for name, value in context.items()} | windows.size


def measure_predictability(lm: DualTrackLM, windows: Windows) -> dict[str, float]:
    """The figures of `describe_predictability`, and of the accompaniment without a prefix."""
    scores = {
        mode: score_batch(lm, windows.codes["vocal"], windows.codes["accompaniment"], mode)
        for mode in tqdm(MODES, desc="lm: predictability", disable=None)
    }
    sizes = {track: lm.codes_of(track).codes for track in TRACKS}
    figures = describe_predictability(scores, windows.codes, sizes, windows.rate_hz)
    for name, first in (("no_prefix", None), ("first_5s", round(_START_SECONDS * windows.rate_hz))):
        bits = scores[_INTO].bits_per_token("accompaniment", first)
        figures[f"cnbpt_{_INTO}_{name}"] = metrics.codebook_normalized_bits(bits, [sizes["accompaniment"]])
    return figures


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


def measure_context(
    lm: DualTrackLM,
    windows: Windows,
    lengths_seconds: Sequence[float] = LENGTHS_SECONDS,
    modes: Sequence[str] = tuple(MODES),
) -> dict[str, float]:
    """cnBPT of windows cut to every length that fits into them, as cnbpt_SERIES_5s ... (P 6.2).

    ..._same_frames_5s: of the frames at the windows' end that the shortest one can count. gain: by how many
    percent the longest context lowers cnBPT, of the same frames and (gain_whole) of whole windows; falling
    share: 1 = every longer context is better than the one before.
    """
    lengths = sorted({length for length in lengths_seconds if length < windows.seconds} | {windows.seconds})
    prefix = round(PREFIX_SECONDS * windows.rate_hz)
    last = max(1, round(lengths[0] * windows.rate_hz) - prefix)
    whole: dict[str, list[float]] = {}
    same: dict[str, list[float]] = {}
    runs = [(mode, length) for mode in modes for length in lengths]
    for mode, length in tqdm(runs, desc="lm: context", disable=None):
        pieces, ends = cut_pieces(windows.codes, round(length * windows.rate_hz))
        scores = score_batch(lm, pieces["vocal"], pieces["accompaniment"], mode)
        skipped = 0 if mode == "unconditional" else prefix
        for track, nats in scores.loss_nats.items():
            name = f"unconditional_{track}" if mode == "unconditional" else mode
            for curves, counted in ((whole, nats[:, skipped:]), (same, nats[ends, -last:])):
                bits = metrics.nats_to_bits(counted.double().mean().item())
                sizes = [lm.codes_of(track).codes]
                curves.setdefault(name, []).append(metrics.codebook_normalized_bits(bits, sizes))
    figures: dict[str, float] = {}
    for curves, ending, gain in ((whole, "", "gain_whole"), (same, "_same_frames", "gain")):
        for name, curve in curves.items():
            by_length = zip(lengths, curve, strict=True)
            figures |= {f"cnbpt_{name}{ending}_{length:g}s": value for length, value in by_length}
            figures[f"{gain}_{name}_percent"] = metrics.relative_gain_percent(curve[-1], curve[0])
            if len(curve) > 1:
                falls = metrics.rising_share([-value for value in curve])
                figures[f"falling_share_{name}{ending}"] = falls
    return figures


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


def measure_costs(
    lm: DualTrackLM,
    windows: Windows,
    shifts_seconds: Mapping[str, float],
    mask_shares: Mapping[str, float],
    seed: int = 0,
) -> dict[str, float]:
    """By how many percent another song's, a shifted and a hidden vocal raise the loss (P 6.1, eq. 8).

    NAME_cost_percent: by the paper's protocol; ..._cost_no_prefix_percent: of whole windows;
    ..._cost_first_5s_percent: of their start, where the accompaniment's own past cannot yet tell key and
    tempo. Each with its standard error over windows (..._error_percent) by the jackknife.
    shifts_seconds, mask_shares: by name, mildest first.
    """
    vocal, rate_hz = windows.codes["vocal"], windows.rate_hz
    frames = {name: round(seconds * rate_hz) for name, seconds in shifts_seconds.items()}
    shifts = {name: shift_source(vocal, by) for name, by in frames.items() if by < vocal.shape[1]}
    masks = {
        # The same draw for every share: what a small share hides, a larger one hides as well.
        name: mask_source(vocal, share, lm.pads["vocal"], torch.Generator().manual_seed(seed))
        for name, share in mask_shares.items()
    }
    shown = {"intact": vocal, "mismatch": vocal[windows.partners], **shifts, **masks}
    losses = {
        name: score_batch(lm, source, windows.codes["accompaniment"], _INTO)
        .loss_nats["accompaniment"]
        .double()
        for name, source in tqdm(shown.items(), desc="lm: costs", disable=None)
    }
    prefix, start = round(PREFIX_SECONDS * rate_hz), round(_START_SECONDS * rate_hz)
    scopes = {"": slice(prefix, None), "_no_prefix": slice(None), "_first_5s": slice(start)}
    figures: dict[str, float] = {}
    for scope, counted in scopes.items():
        means = {name: nats[:, counted].mean(dim=1) for name, nats in losses.items()}  # each [windows]
        intact = means.pop("intact")
        costs = {name: relative_cost(damaged, intact) for name, damaged in means.items()}
        for name, (percent, error) in costs.items():
            figures[f"{name}_cost{scope}_percent"] = percent
            figures[f"{name}_cost{scope}_error_percent"] = error
        for kind, names in (("shift", shifts), ("mask", masks)) if scope != "_no_prefix" else ():
            figures |= severity_figures(kind, scope, [costs[name][0] for name in names])
    return figures


def relative_cost(damaged: Tensor, intact: Tensor) -> tuple[float, float]:
    """Percent and standard error, from each window's loss [windows], in any unit, with and without damage."""
    percent = metrics.corruption_cost_percent(damaged.sum().item(), intact.sum().item())
    count = len(intact)
    if count < 2:
        return percent, 0.0
    without = 100 * ((damaged.sum() - damaged) / (intact.sum() - intact) - 1)  # each window left out once
    return percent, ((count - 1) / count * (without - without.mean()).square().sum()).sqrt().item()


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
