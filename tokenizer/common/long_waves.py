"""Waves that are too long to hold: tensors like any other, whose samples rest in a file of no name.

Whoever goes through such a wave block by block, and lets it go after each, needs memory for a block only.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Iterator
from weakref import WeakValueDictionary

import numpy as np
import torch
from torch import Tensor

from .errors import AudioError

LARGEST_IN_MEMORY_BYTES = 200_000_000  # 8.7 minutes of stereo
BLOCK_SAMPLES = 1_440_000  # 30 s at 48 kHz
_BYTES_PER_SAMPLE = 4

# Of the storages that rest in files, by where they begin.
_MAPS: WeakValueDictionary[int, mmap.mmap] = WeakValueDictionary()


def new_wave(channels: int, samples: int) -> Tensor:
    """Return a silent wave float32 [channels, samples]; a large one rests on disk (AudioError: no room)."""
    size = channels * samples * _BYTES_PER_SAMPLE
    if size <= LARGEST_IN_MEMORY_BYTES:
        return torch.zeros(channels, samples)
    folder = roomy_folder()
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)  # a disk that is full must be found out now
            else:
                file.truncate(size)
            pages = mmap.mmap(file.fileno(), size)
    except (OSError, ValueError, OverflowError) as error:
        raise AudioError(
            f"{folder} has no room for {size / 1e9:.1f} GB of sound: make room there or set TMPDIR to a "
            "folder on another disk"
        ) from error
    wave = torch.from_numpy(np.frombuffer(pages, dtype=np.float32).reshape(channels, samples))
    _MAPS[wave.untyped_storage().data_ptr()] = pages
    return wave


def let_go(wave: Tensor) -> None:
    """Take the pages of a wave on disk out of memory, until they are looked at; other tensors stay."""
    pages = _MAPS.get(wave.untyped_storage().data_ptr())
    if pages is not None and hasattr(pages, "madvise"):
        pages.madvise(mmap.MADV_DONTNEED)  # of a shared file mapping: nothing is lost


def blocks(*waves: Tensor, samples: int = BLOCK_SAMPLES) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Go through equally long waves [..., n] side by side: (which samples, the block of each wave).

    Blocks are views; what was written into one is kept. Each wave is let go after each block.
    """
    for start in range(0, waves[0].shape[-1], samples):
        place = slice(start, start + samples)
        yield place, tuple(wave[..., place] for wave in waves)
        for wave in waves:
            let_go(wave)


def peak(wave: Tensor) -> float:
    """Return the largest magnitude in a wave, 0 of an empty one; NaN or infinite where a sample is."""
    parts = [torch.stack([block.amax(), -block.amin()]).amax() for _, (block,) in blocks(wave)]
    return float(torch.stack(parts).amax()) if parts else 0.0


def map_blocks(function: Callable[..., Tensor], *waves: Tensor) -> Tensor:
    """Return function(*waves) of waves [channels, samples], for functions that see each sample by itself."""
    result = new_wave(*waves[0].shape)
    for _, (place, *parts) in blocks(result, *waves):
        place.copy_(function(*parts))
    return result


def amplify(wave: Tensor, gain: float) -> Tensor:
    """Multiply a wave [..., n] by a gain in place, and return it."""
    if gain != 1:
        for _, (block,) in blocks(wave):
            block.mul_(gain)
    return wave


def roomy_folder() -> str:
    """Where large files may lie for a while; /tmp is in memory on many systems, /var/tmp is not."""
    if not os.environ.get("TMPDIR") and os.access("/var/tmp", os.W_OK | os.X_OK):
        return "/var/tmp"
    return tempfile.gettempdir()
