"""Waves at the rate of a published autoencoder, which need not be ours."""

import numpy as np
import soxr
import torch
from torch import Tensor


def resample(wave: Tensor, from_hz: int, to_hz: int, samples: int) -> Tensor:
    """wave [..., n] at from_hz -> [..., samples] float32 at to_hz, on its device; no gradients pass.

    What is missing at the end is silence; at equal rates the wave is only cut or lengthened.
    """
    flat = wave.detach().float().cpu().reshape(-1, wave.shape[-1]).numpy().T  # [n, channels]
    if from_hz != to_hz:
        flat = soxr.resample(np.ascontiguousarray(flat), from_hz, to_hz)
    flat = np.pad(flat[:samples], ((0, max(0, samples - len(flat))), (0, 0)))
    resampled = torch.from_numpy(np.ascontiguousarray(flat.T))
    return resampled.reshape(*wave.shape[:-1], samples).to(wave.device)
