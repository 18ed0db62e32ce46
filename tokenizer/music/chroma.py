"""Chroma of whole recordings in bounded memory."""

import numpy as np
import torch
from torch import Tensor

from ..spectra import Chroma

CHROMA_RATE_HZ = 50.0
_HOP_SAMPLES = 960
_CHUNK_FRAMES = 500
_HALO_FRAMES = 5  # 4,800 samples: more than half of the 8,192-sample window


@torch.no_grad()
def measure_chroma(wave: Tensor) -> np.ndarray:
    """Chroma [frames, 12] at 50 Hz, C first, in 0..1, of wave [channels, samples] (the tokenizer's)."""
    mono = wave.float().mean(dim=0).cpu()
    mono = torch.nn.functional.pad(mono, (0, -len(mono) % _HOP_SAMPLES))
    front_end = Chroma(hop_samples=_HOP_SAMPLES)
    frames = len(mono) // _HOP_SAMPLES
    pieces = []
    for start in range(0, frames, _CHUNK_FRAMES):
        low, stop = max(0, start - _HALO_FRAMES), min(frames, start + _CHUNK_FRAMES)
        high = min(frames, stop + _HALO_FRAMES)
        piece = front_end(mono[None, low * _HOP_SAMPLES : high * _HOP_SAMPLES])[0]
        pieces.append(piece[start - low : stop - low])
    return torch.cat(pieces).numpy().astype(np.float64) if pieces else np.zeros((0, 12))


def correlate_chroma(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean over frames of the correlation of two mean-free chromas [frames, 12]; None if all are flat."""
    frames = min(len(first), len(second))
    first, second = (c[:frames] - c[:frames].mean(axis=1, keepdims=True) for c in (first, second))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    used = norms > 1e-6
    return float(((first * second).sum(axis=1)[used] / norms[used]).mean()) if used.any() else None
