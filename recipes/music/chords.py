"""Chords from chroma: major and minor templates smoothed by Viterbi."""

from __future__ import annotations

import numpy as np

from duotok.recipes.music.key import PITCH_CLASSES

CHORD_NAMES = (*(f"{name}:maj" for name in PITCH_CLASSES), *(f"{name}:min" for name in PITCH_CLASSES), "N")
_BLOCK_RATE_HZ = 10.0  # chords are decided ten times a second
_SHARPNESS = 12.0  # log-likelihood per unit of cosine similarity
_CHANGE_PENALTY = 6.0  # log-probability lost by a change of chord: about one change a second at most


def chord_templates() -> np.ndarray:
    """Unit-length templates [25, 12]: 12 major, 12 minor, and the flat one that stands for "no chord"."""
    templates = np.zeros((25, 12))
    for root in range(12):
        templates[root, [root, (root + 4) % 12, (root + 7) % 12]] = 1.0
        templates[12 + root, [root, (root + 3) % 12, (root + 7) % 12]] = 1.0
    templates[24] = 1.0
    return templates / np.linalg.norm(templates, axis=1, keepdims=True)


def estimate_chords(chroma: np.ndarray, rate_hz: float) -> list[tuple[float, float, str]]:
    """Chord segments (start seconds, end seconds, "C:maj" | "A:min" | "N") that cover the whole input.

    chroma: [frames, 12], non-negative, C first, at rate_hz frames per second.
    """
    chroma = np.asarray(chroma, dtype=np.float64)
    if len(chroma) == 0:
        return []
    width = max(1, round(rate_hz / _BLOCK_RATE_HZ))
    starts = np.arange(0, len(chroma), width)
    blocks = np.add.reduceat(chroma, starts, axis=0)
    norms = np.linalg.norm(blocks, axis=1, keepdims=True)
    blocks = np.where(norms > 1e-9, blocks / np.maximum(norms, 1e-9), 1 / np.sqrt(12))
    path = _viterbi(_SHARPNESS * blocks @ chord_templates().T)
    changes = np.flatnonzero(np.diff(path)) + 1
    edges = [0, *changes.tolist(), len(path)]
    total_seconds = len(chroma) / rate_hz
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
