"""Chords from chroma: the harmony reader's judgement of every 0.1 s, smoothed by Viterbi."""

from __future__ import annotations

import numpy as np
import torch

from .blocks import average_blocks, block_frames
from .chord_names import CHORD_NAMES, NO_CHORD
from .harmony_reader import HarmonyReader, default_reader

_CHANGE_PENALTY = 5.0  # log-probability lost by a change of chord
_IMPOSSIBLE = -100.0
_SILENT_CHROMA = 1e-6  # a block with no bin above it sounds of nothing


def estimate_chords(
    chroma: np.ndarray,
    rate_hz: float,
    *,
    sounding: np.ndarray | None = None,
    reader: HarmonyReader | None = None,
) -> list[tuple[float, float, str]]:
    """Chord segments (start seconds, end seconds, "C:maj" | "A:min" | "N") that cover the whole input.

    chroma: [frames, 12] in 0..1, C first, at rate_hz frames per second, as the tokenizer reads it out of
    codes or measures it. sounding: [frames] at the same rate; where it is false there is no chord.
    reader: None takes the one that ships.
    """
    chroma = np.asarray(chroma, dtype=np.float64)
    if len(chroma) == 0:
        return []
    blocks = average_blocks(chroma, rate_hz)
    silent = blocks.max(axis=1) <= _SILENT_CHROMA
    if sounding is not None:
        silent |= average_blocks(sounding, rate_hz) < 0.5
    scores = (reader or default_reader()).judge(torch.from_numpy(blocks).float()).double().numpy()
    scores[silent] = _IMPOSSIBLE
    scores[silent, NO_CHORD] = 0.0
    path = find_path(scores, np.full(len(scores), _CHANGE_PENALTY))
    changes = np.flatnonzero(np.diff(path)) + 1
    edges = [0, *changes.tolist(), len(path)]
    width, total_seconds = block_frames(rate_hz), len(chroma) / rate_hz
    return [
        (begin * width / rate_hz, min(end * width / rate_hz, total_seconds), CHORD_NAMES[path[begin]])
        for begin, end in zip(edges[:-1], edges[1:], strict=True)
    ]


def find_path(scores: np.ndarray, costs: np.ndarray) -> np.ndarray:
    """Return the best states [steps] by scores [steps, states] when a change into step i costs costs[i]."""
    steps, states = scores.shape
    if steps == 0:
        return np.zeros(0, dtype=np.int64)
    origin = np.zeros((steps, states), dtype=np.int64)
    total = scores[0]
    for step in range(1, steps):
        leader = int(total.argmax())
        changed = total[leader] - costs[step]
        origin[step] = np.where(total >= changed, np.arange(states), leader)
        total = np.maximum(total, changed) + scores[step]
    path = np.empty(steps, dtype=np.int64)
    path[-1] = total.argmax()
    for step in range(steps - 1, 0, -1):
        path[step - 1] = origin[step, path[step]]
    return path
