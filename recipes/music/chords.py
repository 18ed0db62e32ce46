"""Chords from chroma: major and minor templates smoothed by Viterbi."""

from __future__ import annotations

import numpy as np

from duotok.recipes.music.key import PITCH_CLASSES

CHORD_NAMES = (*(f"{name}:maj" for name in PITCH_CLASSES), *(f"{name}:min" for name in PITCH_CLASSES), "N")
_BLOCK_RATE_HZ = 10.0  # chords are decided ten times a second
_SHARPNESS = 3.0  # log-likelihood per unit of correlation and block
_CHANGE_PENALTY = 3.0  # log-probability lost by a change of chord
_NO_CHORD_CORRELATION = 0.25  # "N" wins where no triad reaches this


def chord_templates() -> np.ndarray:
    """Mean-free unit-length templates [24, 12] of the major and minor triads; roots count a little more."""
    templates = np.zeros((24, 12))
    for root in range(12):
        for row, third in ((root, 4), (12 + root, 3)):
            templates[row, [root, (root + third) % 12, (root + 7) % 12]] = (1.2, 1.0, 1.0)
    templates -= templates.mean(axis=1, keepdims=True)
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
    blocks -= blocks.mean(axis=1, keepdims=True)
    norms = np.linalg.norm(blocks, axis=1, keepdims=True)
    correlations = blocks @ chord_templates().T / np.maximum(norms, 1e-9)  # [blocks, 24]
    silence = np.full((len(blocks), 1), _NO_CHORD_CORRELATION)
    path = _viterbi(_SHARPNESS * np.concatenate([correlations, silence], axis=1))
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
