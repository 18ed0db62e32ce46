"""How predictable codes are, by mode: the paper's tables 2, 3, 5 and 6 (P A.1 to A.4, B.1, E.1)."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor
from tqdm import tqdm

from duotok.lm import metrics
from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import Scores, score_batch
from duotok.recipes.evaluation.diagnosis import Windows
from duotok.tokenizer.model import TRACKS

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
