"""How far each frame of a sheet that was read can be trusted: by the chances that the reader gave it."""

import numpy as np

from .columns import UNKNOWN, WRITTEN


def measure_trust(log_probabilities: np.ndarray, chosen: np.ndarray, reach_frames: int) -> np.ndarray:
    """Return levels [frames] in 0..WRITTEN - 1 of choices [frames]; UNKNOWN where they are.

    log_probabilities: [frames, choices]. The level is the share of the choice's information that the reader
    had, log(choices x chance) / log(choices), as a mean over reach_frames around: 0 where it guessed or was
    of another opinion.
    """
    frames, choices = log_probabilities.shape
    is_known = chosen != UNKNOWN
    told = 1 + log_probabilities[np.arange(frames), chosen] / np.log(choices)
    sums = np.stack([np.concatenate([[0.0], (row * is_known).cumsum()]) for row in (told, np.ones(frames))])
    first = (np.arange(frames) - reach_frames // 2).clip(0)
    last = (np.arange(frames) + reach_frames // 2 + 1).clip(max=frames)
    total, count = sums[:, last] - sums[:, first]
    levels = np.floor(total / np.maximum(count, 1) * WRITTEN).astype(np.int64).clip(0, WRITTEN - 1)
    return np.where(is_known, levels, UNKNOWN)
