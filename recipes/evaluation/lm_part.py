"""Figures of the language model under teacher forcing: how predictable codes are, what the vocal is worth.

The paper's protocol (P B.1): windows of 30 s; unconditional over both tracks; track to track with the first
2 s of the target given and not counted. Without a prefix the vocal matters most, so that is measured as well.
"""

import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.model import DualTrackLM
from duotok.lm.scoring import Scores, mask_source, score_batch, shift_source
from duotok.recipes.evaluation.coherence import pair_with_others
from duotok.recipes.evaluation.excerpts import choose_excerpts, read_test_items
from duotok.recipes.evaluation.settings import Settings
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

_ITEMS, _SECONDS = 48, 30.0
_PREFIX_SECONDS = 2.0
_START_SECONDS = 5.0
_RANKS = (1, 5, 10, 50)
_INTO = "vocal_to_accompaniment"


def measure_lm(settings: Settings) -> dict[str, float]:
    """cnBPT, enBPT, Acc@k, cnBPS by mode; costs in percent of another song's, a shifted and no vocal."""
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
    return figures | {"windows": len(excerpts), "window_seconds": excerpts[0].seconds}


def measure_codes(
    lm: DualTrackLM, codes: dict[str, Tensor], partners: list[int], rate_hz: float, seed: int
) -> dict[str, float]:
    """All figures for codes {"vocal", "accompaniment"}, each [windows, frames]; partners: of other songs."""
    vocal, accompaniment = codes["vocal"], codes["accompaniment"]
    sizes = {track: lm.codes_of(track).codes for track in TRACKS}
    prefix, start = round(_PREFIX_SECONDS * rate_hz), round(_START_SECONDS * rate_hz)
    hidden = torch.full_like(vocal, lm.pads["vocal"])
    half_hidden = mask_source(vocal, 0.5, lm.pads["vocal"], torch.Generator().manual_seed(seed))
    # name -> (mode, the vocal that is shown)
    runs = {
        "unconditional": ("unconditional", vocal),
        _INTO: (_INTO, vocal),
        "accompaniment_to_vocal": ("accompaniment_to_vocal", vocal),
        "mismatch": (_INTO, vocal[partners]),
        "no_vocal": (_INTO, hidden),
        "mask_half": (_INTO, half_hidden),
        "shift_1s": (_INTO, shift_source(vocal, round(rate_hz))),
    }
    scores = {
        name: score_batch(lm, shown, accompaniment, mode, prefix_frames=0)
        for name, (mode, shown) in tqdm(runs.items(), desc="lm: scores", disable=None)
    }
    figures: dict[str, float] = {}
    for track in TRACKS:
        name = f"unconditional_{track}"
        figures |= _describe(name, scores["unconditional"], track, codes[track], sizes[track])
    for name, track in ((_INTO, "accompaniment"), ("accompaniment_to_vocal", "vocal")):
        figures |= _describe(name, _after(scores[name], prefix), track, codes[track], sizes[track])
    figures["cnbps_unconditional"] = metrics.codebook_normalized_rate(
        [figures[f"cnbpt_unconditional_{track}"] for track in TRACKS], [rate_hz] * len(TRACKS)
    )
    right = scores[_INTO]
    size = [sizes["accompaniment"]]
    for name, first in (("no_prefix", None), ("first_5s", start)):
        bits = right.bits_per_token("accompaniment", first)
        figures[f"cnbpt_{_INTO}_{name}"] = metrics.codebook_normalized_bits(bits, size)
    for name in ("mismatch", "no_vocal", "mask_half", "shift_1s"):
        figures[f"{name}_cost_percent"] = _cost(_after(scores[name], prefix), _after(right, prefix))
        figures[f"{name}_cost_no_prefix_percent"] = _cost(scores[name], right)
        figures[f"{name}_cost_first_5s_percent"] = _cost(scores[name], right, start)
    return figures


def _after(scores: Scores, prefix_frames: int) -> Scores:
    """The same scores with the first frames given, not counted: teacher forcing makes no other difference."""
    return Scores(loss_nats=scores.loss_nats, ranks=scores.ranks, prefix_frames=prefix_frames)


def _describe(name: str, scores: Scores, track: str, codes: Tensor, size: int) -> dict[str, float]:
    bits = scores.bits_per_token(track)
    entropy = metrics.unigram_entropy_bits(metrics.code_counts(codes, size))
    figures = {
        f"bpt_{name}": bits,
        f"cnbpt_{name}": metrics.codebook_normalized_bits(bits, [size]),
        f"enbpt_{name}": metrics.entropy_normalized_bits(bits, entropy),
    }
    return figures | {f"acc_at_{k}_{name}": scores.accuracy_at(track, k) for k in _RANKS}


def _cost(damaged: Scores, intact: Scores, first_frames: int | None = None) -> float:
    bits = (scores.bits_per_token("accompaniment", first_frames) for scores in (damaged, intact))
    return metrics.corruption_cost_percent(*bits)
