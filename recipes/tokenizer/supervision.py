"""Cuts of several kinds as one batch, with the lyrics where they are supervised (P C.3)."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.tokenizer.cuts import Cut
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.objectives import KINDS
from duotok.tokenizer.text import TextVocabulary

SHORTEST_RUN_SECONDS = 0.3
SLACK_FRAMES = 1  # that a run's frames reach beyond its times


def collate_cuts(
    cuts: Sequence[Cut],
    vocabulary: TextVocabulary | None,
    text_kinds: Sequence[str],
    text_coverage: float,
    run_seconds: float,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Return {"stems" [batch, 4, samples], "kind" [batch], "text" [runs, longest], "text_span" [runs, 3]}.

    A run is some consecutive lines of one cut, of random length up to about run_seconds: its row of text
    holds its lyric tokens, -1 after their end; its text_span the cut's index and the first and the
    after-last of its frames. Cuts of other kinds than text_kinds and a share 1 - text_coverage of the others
    have no runs. Without any run there is one row of no tokens.
    """
    covered = rng.random(len(cuts)) < text_coverage
    rows: list[list[int]] = []
    spans: list[tuple[int, int, int]] = []
    for index, (cut, is_covered) in enumerate(zip(cuts, covered, strict=True)):
        if vocabulary is None or not is_covered or cut.kind not in text_kinds:
            continue
        for start, end, text in draw_runs(cut.lines, run_seconds, rng):
            rows.append(vocabulary.encode(text))
            first = max(0, math.floor(start * DuoTokenizer.frame_rate_hz) - SLACK_FRAMES)
            spans.append((index, first, math.ceil(end * DuoTokenizer.frame_rate_hz) + SLACK_FRAMES))
    text_rows = torch.full((max(1, len(rows)), max([1, *map(len, rows)])), -1)
    for number, row in enumerate(rows):
        text_rows[number, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return {
        "stems": torch.stack([cut.stems for cut in cuts]),
        "kind": torch.tensor([KINDS.index(cut.kind) for cut in cuts]),
        "text": text_rows,
        "text_span": torch.tensor(spans or [(0, 0, 1)]),
    }


def draw_runs(
    lines: Sequence[tuple[float, float, str]], longest_seconds: float, rng: np.random.Generator
) -> list[tuple[float, float, str]]:
    """Join consecutive lines to runs of random lengths; a run ends with the line that reaches its length."""
    runs: list[tuple[float, float, str]] = []
    wanted = 0.0
    for start, end, text in lines:
        if runs and runs[-1][1] - runs[-1][0] < wanted:
            runs[-1] = (runs[-1][0], end, f"{runs[-1][2]} {text}")
            continue
        runs.append((start, end, text))
        wanted = rng.uniform(SHORTEST_RUN_SECONDS, max(SHORTEST_RUN_SECONDS, longest_seconds))
    return runs
