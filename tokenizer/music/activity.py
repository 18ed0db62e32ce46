"""Whether a track sounds, from the mel that its codes stand for."""

import numpy as np
import torch
from torch import Tensor

from ..model import CHROMA_PER_FRAME, MEL_PER_FRAME

ACTIVITY_RATE_HZ = 25.0
# Of the summed mel power. Set on training songs to tell what is within 25 dB of the standard level (RMS 0.1,
# where the sum is some 5 dB above the wave's power; codes read quiet frames out a few dB too quiet).
_READ_OUT_THRESHOLD_DB = -42.0
_SHORTEST_GAP_SECONDS = 0.3


def estimate_activity(mel: Tensor) -> np.ndarray:
    """Whether each frame of 40 ms sounds [frames], by mel [4 * frames, bands] read out of a track's codes."""
    power = mel_power(mel)
    frames = power.unflatten(0, (-1, MEL_PER_FRAME)).mean(dim=-1).numpy()
    return 10 * np.log10(np.maximum(frames, 1e-12)) > _READ_OUT_THRESHOLD_DB


def mel_power(mel: Tensor) -> Tensor:
    """Summed mel power [frames] float64 of log10-mel magnitudes [frames, bands]."""
    parts = [(10.0 ** (2.0 * part.cpu().double())).sum(dim=-1) for part in mel.detach().split(30_000)]
    return torch.cat(parts)


def at_chroma_rate(active: np.ndarray) -> np.ndarray:
    """Activity [frames] at 25 Hz for every frame of chroma [2 * frames]."""
    return np.repeat(active, CHROMA_PER_FRAME)


def active_segments(active: np.ndarray, rate_hz: float = ACTIVITY_RATE_HZ) -> list[tuple[float, float]]:
    """Stretches (start seconds, end seconds) that sound, of active [frames]; gaps below 0.3 s are closed."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], np.asarray(active, dtype=np.int8), [0]])))
    segments: list[tuple[float, float]] = []
    for begin, end in zip(edges[::2] / rate_hz, edges[1::2] / rate_hz, strict=True):
        if segments and begin - segments[-1][1] < _SHORTEST_GAP_SECONDS:
            segments[-1] = (segments[-1][0], float(end))
        else:
            segments.append((float(begin), float(end)))
    return segments
