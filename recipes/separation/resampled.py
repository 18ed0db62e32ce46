"""Waves at another rate than ours, for models that were trained at 44.1 kHz."""

import numpy as np
import soxr
import torch
from torch import Tensor


def resample_wave(wave: Tensor, from_hz: int, to_hz: int, *, samples: int | None = None) -> Tensor:
    """wave [..., samples] at from_hz -> [..., round(samples * to_hz / from_hz)], or exactly `samples`."""
    length = samples if samples is not None else round(wave.shape[-1] * to_hz / from_hz)
    if from_hz == to_hz:
        data = wave.reshape(-1, wave.shape[-1]).cpu().numpy().T
    else:
        data = soxr.resample(wave.reshape(-1, wave.shape[-1]).cpu().numpy().T, from_hz, to_hz)
    data = np.pad(data[:length], ((0, max(0, length - len(data))), (0, 0)))
    return torch.from_numpy(np.ascontiguousarray(data.T)).reshape(*wave.shape[:-1], length)
