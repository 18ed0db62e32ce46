"""A recording of any length, rate and number of channels as consecutive blocks of stereo at 48 kHz."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import AudioError

READ_SECONDS = 10


def stream_audio(path: str | Path, block_samples: int) -> Iterator[Tensor]:
    """Blocks float32 [2, block_samples] at 48 kHz, the last one shorter; one block in memory at a time.

    The resampler runs through, so the blocks joined are what resampling the whole recording gives. More than
    two channels are folded to their mean. Raises AudioError when it is unreadable, empty or not finite.
    """
    waiting: list[np.ndarray] = []
    count = 0
    for data in _resampled(Path(path)):
        waiting.append(data)
        count += len(data)
        while count >= block_samples:
            joined = np.concatenate(waiting)
            yield _tensor(joined[:block_samples])
            waiting, count = [joined[block_samples:]], count - block_samples
    if count:
        yield _tensor(np.concatenate(waiting))


def _resampled(path: Path) -> Iterator[np.ndarray]:
    if not path.is_file():
        raise AudioError(f"{path} does not exist; check the path")
    if path.stat().st_size == 0:
        raise AudioError(f"{path} is an empty file")
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate_hz = file.samplerate
            resampler = soxr.ResampleStream(rate_hz, SAMPLE_RATE_HZ, 2, dtype="float32")
            total = 0
            while len(data := file.read(READ_SECONDS * rate_hz, dtype="float32", always_2d=True)):
                if not np.isfinite(data).all():
                    raise AudioError(f"{path} holds NaN or infinite samples; export it again")
                total += len(data)
                if data.shape[1] != 2:
                    data = np.repeat(data.mean(axis=1, keepdims=True), 2, axis=1)
                yield data if rate_hz == SAMPLE_RATE_HZ else resampler.resample_chunk(data)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise AudioError(f"{path} is not readable as audio; convert it to WAV or FLAC first") from error
    if total == 0:
        raise AudioError(f"{path} has no samples; give a recording that has sound")
    if rate_hz != SAMPLE_RATE_HZ:
        yield resampler.resample_chunk(np.zeros((0, 2), np.float32), last=True)


def _tensor(data: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data.T))
