"""Chroma of whole recordings in bounded memory, its means over blocks, and when a track sounds."""

import numpy as np
import torch
from torch import Tensor

from ..common.chunks import join_chunks
from ..common.long_waves import let_go
from ..model import CHROMA_PER_FRAME, MEL_PER_FRAME
from ..spectra import Chroma

CHROMA_RATE_HZ = 50.0
BLOCK_RATE_HZ = 10.0  # that harmony is read at
_HOP_SAMPLES = 960
_CHROMA_CHUNK = 500
_HALO_FRAMES = 5  # 4,800 samples: more than half of the 8,192-sample window
ACTIVITY_RATE_HZ = 25.0
# Of the summed mel power. Set on training songs to tell what is within 25 dB of the standard level (RMS 0.1,
# where the sum is some 5 dB above the wave's power; codes read quiet frames out a few dB too quiet).
_READ_OUT_THRESHOLD_DB = -42.0
_SHORTEST_GAP_SECONDS = 0.3


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
    chroma = join_chunks(frames, compute, size=_CHROMA_CHUNK, halo=_HALO_FRAMES)
    return chroma[0].numpy().astype(np.float64)


def correlate_chroma(first: np.ndarray, second: np.ndarray) -> float | None:
    """Mean over frames of the correlation of two mean-free chromas [frames, 12]; None if all are flat."""
    frames = min(len(first), len(second))
    first, second = (c[:frames] - c[:frames].mean(axis=1, keepdims=True) for c in (first, second))
    norms = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    used = norms > 1e-6
    return float(((first * second).sum(axis=1)[used] / norms[used]).mean()) if used.any() else None


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


def estimate_activity(mel: Tensor) -> np.ndarray:
    """Whether each frame of 40 ms sounds [frames], by mel [4 * frames, bands] read out of a track's codes."""
    frames = mel_power(mel).unflatten(0, (-1, MEL_PER_FRAME)).mean(dim=-1).numpy()
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
