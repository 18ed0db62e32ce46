"""Chords from chroma: the harmony reader's judgement of every 0.1 s, smoothed by Viterbi."""

from __future__ import annotations

import numpy as np
import torch

from duotok.recipes.music.blocks import average_blocks, block_frames
from duotok.recipes.music.harmony_reader import NO_CHORD, HarmonyReader, default_reader
from duotok.recipes.music.key import PITCH_CLASSES

CHORD_NAMES = (*(f"{name}:maj" for name in PITCH_CLASSES), *(f"{name}:min" for name in PITCH_CLASSES), "N")
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
    path = _viterbi(scores)
    changes = np.flatnonzero(np.diff(path)) + 1
    edges = [0, *changes.tolist(), len(path)]
    width, total_seconds = block_frames(rate_hz), len(chroma) / rate_hz
    return [
        (begin * width / rate_hz, min(end * width / rate_hz, total_seconds), CHORD_NAMES[path[begin]])
        for begin, end in zip(edges[:-1], edges[1:], strict=True)
    ]


def _viterbi(scores: np.ndarray) -> np.ndarray:
    """Best state path [steps] through scores [steps, states] when each change costs _CHANGE_PENALTY."""
    steps, states = scores.shape
    came_from = np.empty((steps, states), dtype=np.int64)
    total = scores[0]
    for step in range(1, steps):
        leader = int(total.argmax())
        stay = total >= total[leader] - _CHANGE_PENALTY
        came_from[step] = np.where(stay, np.arange(states), leader)
        total = np.where(stay, total, total[leader] - _CHANGE_PENALTY) + scores[step]
    path = np.empty(steps, dtype=np.int64)
    path[-1] = total.argmax()
    for step in range(steps - 1, 0, -1):
        path[step - 1] = came_from[step, path[step]]
    return path
