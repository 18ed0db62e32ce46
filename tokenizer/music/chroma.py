"""Chroma of whole recordings in bounded memory."""

import numpy as np
import torch
from torch import Tensor

from ..common.chunks import join_chunks
from ..common.long_waves import let_go
from ..spectra import Chroma

CHROMA_RATE_HZ = 50.0
_HOP_SAMPLES = 960
_CHUNK_FRAMES = 500
_HALO_FRAMES = 5  # 4,800 samples: more than half of the 8,192-sample window


@torch.no_grad()
def measure_chroma(wave: Tensor) -> np.ndarray:
    """Chroma [frames, 12] at 50 Hz, C first, in 0..1, of wave [channels, samples] (the tokenizer's)."""
    front_end = Chroma(hop_samples=_HOP_SAMPLES)

    def compute(low: int, high: int) -> Tensor:
        mono = wave[:, low * _HOP_SAMPLES : high * _HOP_SAMPLES].float().mean(dim=0, keepdim=True).cpu()
        let_go(wave)
        return front_end(torch.nn.functional.pad(mono, (0, -mono.shape[-1] % _HOP_SAMPLES)))

    frames = -(-wave.shape[-1] // _HOP_SAMPLES)
    if frames == 0:
        return np.zeros((0, 12))
    chroma = join_chunks(frames, compute, size=_CHUNK_FRAMES, halo=_HALO_FRAMES)
    return chroma[0].numpy().astype(np.float64)


def correlate_chroma(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean over frames of the correlation of two mean-free chromas [frames, 12]; None if all are flat."""
    frames = min(len(first), len(second))
    first, second = (c[:frames] - c[:frames].mean(axis=1, keepdims=True) for c in (first, second))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    used = norms > 1e-6
    return float(((first * second).sum(axis=1)[used] / norms[used]).mean()) if used.any() else None
