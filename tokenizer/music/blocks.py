"""Chroma at the rate that harmony is read at."""

import numpy as np

from .harmony_reader import BLOCK_RATE_HZ


def block_frames(rate_hz: float) -> int:
    """Number of frames that one block of about 0.1 s has."""
    return max(1, round(rate_hz / BLOCK_RATE_HZ))


def average_blocks(frames: np.ndarray, rate_hz: float) -> np.ndarray:
    """Means [blocks, ...] of frames [frames, ...]; the last block may be shorter."""
    frames = np.asarray(frames, dtype=np.float64)
    if len(frames) == 0:
        return frames
    starts = np.arange(0, len(frames), block_frames(rate_hz))
    counts = np.diff(starts, append=len(frames))
    sums = np.add.reduceat(frames, starts, axis=0)
    return sums / counts.reshape(-1, *[1] * (frames.ndim - 1))
