"""How fast codes are sampled: by the project's decoding, and by `transformers` as it comes."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from duotok.lm.contract import LanguageModel, SamplingConfig
from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.evaluation.plain_decoding import generate_plainly
from duotok.recipes.evaluation.speed import CORES

CANDIDATES = 4
_ROUNDS = 2


def time_decoding(
    lm: LanguageModel[Any], vocal_codes: Tensor, rate_hz: float, guidance: float
) -> dict[str, float]:
    """Seconds of computing per second of audio for 1 and 4 candidates, and by a plain loop; one run.

    vocal_codes: [frames], at most one window. Each is timed in turn and the fastest round counts, on two CPU
    cores at most. plain_loop_equal_codes: share of codes that the plain loop, by the same random numbers,
    chooses as well.
    """
    assert isinstance(lm, DualTrackLM), "the plain loop plays no other models"
    config = SamplingConfig(guidance=guidance)
    vocal_codes = vocal_codes[: config.window_frames]
    seconds = len(vocal_codes) / rate_hz
    found: dict[str, Tensor] = {}

    def sample(count: int) -> Tensor:
        return lm.compose(vocal_codes, seeds=list(range(count)), sampling=config).codes

    runs: dict[str, Callable[[], Tensor]] = {
        "lm_seconds_per_second": lambda: sample(1),
        f"lm_seconds_per_second_{CANDIDATES}": lambda: sample(CANDIDATES),
        "plain_loop_seconds_per_second": lambda: generate_plainly(lm, vocal_codes, 0, config)[None],
    }
    threads = torch.get_num_threads()
    torch.set_num_threads(min(threads, CORES))
    figures = dict.fromkeys(runs, float("inf"))
    try:
        for _ in range(_ROUNDS):
            for name, run in runs.items():
                began = time.perf_counter()
                found[name] = run()
                figures[name] = min(figures[name], (time.perf_counter() - began) / seconds)
    finally:
        torch.set_num_threads(threads)
    one, several, plain = figures.values()
    ours, theirs = found["lm_seconds_per_second"][0], found["plain_loop_seconds_per_second"][0]
    return figures | {
        f"cost_of_{CANDIDATES}_candidates": several / one,
        "times_faster_than_plain_loop": plain / one,
        "plain_loop_equal_codes": float((ours == theirs).float().mean()),
    }
