"""Figures of the language model under teacher forcing: how predictable codes are, what the vocal is worth.

The paper's protocol (P B.1): windows of 30 s; unconditional over both tracks; track to track with the first
2 s of the target given and not counted. Without a prefix the vocal matters most, so that is measured as well.
`diagnose` draws the same and has the full curves.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import Scores, mask_source, score_batch, shift_source
from duotok.recipes.evaluation.coherence import pair_with_others
from duotok.recipes.evaluation.context_scaling import measure_context
from duotok.recipes.evaluation.corruption import severity_figures
from duotok.recipes.evaluation.diagnosis import Windows
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.predictability import PREFIX_SECONDS, after_prefix, describe_predictability
from duotok.recipes.evaluation.settings import Settings
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

_ITEMS, _SECONDS = 48, 30.0
_START_SECONDS = 5.0
_INTO = "vocal_to_accompaniment"
# Damages by rising severity; those of a whole window or more are left out.
SHIFTS_SECONDS = {"shift_40ms": 0.04, "shift_200ms": 0.2, "shift_1s": 1.0, "shift_4s": 4.0}
MASK_SHARES = {"mask_quarter": 0.25, "mask_half": 0.5, "mask_three_quarters": 0.75, "no_vocal": 1.0}
CONTEXT_MODES = ("unconditional", _INTO)


def measure_lm(settings: Settings) -> dict[str, float]:
    """cnBPT, enBPT, Acc@k, rates by mode; what another song's, a shifted, a hidden vocal costs; context."""
    tokenizer = DuoTokenizer.from_pretrained(settings.bundle / "tokenizer")
    lm = DualTrackLM.from_pretrained(settings.bundle / "lm")
    if lm.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the tokenizer in {settings.bundle} is not the one its language model learned from"
        )
    excerpts = choose_excerpts(
        read_test_items(settings.corpus),
        count=settings.items or _ITEMS,
        seconds=settings.seconds or _SECONDS,
        seed=settings.seed,
    )
    rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    for excerpt in tqdm(excerpts, desc="lm: codes", disable=None):
        for track in TRACKS:
            rows[track].append(tokenizer.encode(excerpt.read(track)[None], track)[0])
    codes = {track: torch.stack(parts) for track, parts in rows.items()}  # [windows, frames]
    partners = pair_with_others([excerpt.item.song for excerpt in excerpts])
    figures = measure_codes(lm, codes, partners, tokenizer.frame_rate_hz, settings.seed)
    figures |= measure_context_steps(
        lm, Windows(codes=codes, partners=partners, rate_hz=tokenizer.frame_rate_hz)
    )
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


def measure_context_steps(lm: DualTrackLM, windows: Windows) -> dict[str, float]:
    """cnBPT by length of context, of both tracks alone and of the accompaniment from the vocal (P 6.2)."""
    figures = measure_context(lm, windows, modes=CONTEXT_MODES).figures()
    return {
        f"context_{name}": value for name, value in figures.items() if name not in ("windows", "last_seconds")
    }


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
