"""Reading any recording soundfile knows as float32 at 48 kHz, and writing waves safely."""

import os
from pathlib import Path

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from .errors import AudioError
from .files import WriteError, whole_file

SAMPLE_RATE_HZ = 48_000


def audio_seconds(path: str | Path) -> float:
    """Return the length of a recording in seconds, from its header."""
    path = _existing_file(path)
    try:
        info = soundfile.info(str(path))
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _unreadable(path) from error
    return info.frames / info.samplerate


def read_audio(
    path: str | Path, *, channels: int | None = 2, start_seconds: float = 0.0, seconds: float | None = None
) -> Tensor:
    """Read a recording (or a cut of it) as float32 [channels, samples] at 48 kHz.

    channels: 1 averages, 2 copies a mono recording to both sides and folds more than two channels down to
    their mean on both sides, None keeps what the file has. The result has round(frames * 48000 / rate)
    samples.

    Raises AudioError when the file is missing, not audio, empty, truncated or holds NaN or infinite samples.
    """
    path = _existing_file(path)
    try:
        with soundfile.SoundFile(str(path)) as file:
            rate = file.samplerate
            start = round(start_seconds * rate)
            if start > 0:
                file.seek(min(start, file.frames))
            frames = -1 if seconds is None else round(seconds * rate)
            data = file.read(frames, dtype="float32", always_2d=True)
    except (soundfile.SoundFileError, RuntimeError) as error:
        raise _unreadable(path) from error
    if data.shape[0] == 0:
        raise AudioError(f"{path} has no samples at {start_seconds:g} s; give a recording that has sound")
    if not np.isfinite(data).all():
        raise AudioError(f"{path} holds NaN or infinite samples; export it again from your audio editor")
    data = _to_channels(data, channels)
    if rate != SAMPLE_RATE_HZ:
        samples = round(data.shape[0] * SAMPLE_RATE_HZ / rate)
        data = soxr.resample(data, rate, SAMPLE_RATE_HZ)
        data = _to_length(data, samples)
    return torch.from_numpy(np.ascontiguousarray(data.T))


def change_speed(wave: Tensor, speed: float) -> Tensor:
    """Return wave [channels, samples] played faster by a factor: [channels, round(samples / speed)].

    Pitch, formants and tempo go along, as on a tape.
    """
    if speed == 1.0:
        return wave
    data = soxr.resample(wave.numpy().T, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ)
    return torch.from_numpy(np.ascontiguousarray(_to_length(data, round(wave.shape[1] / speed)).T))


def write_audio(path: str | Path, wave: Tensor, *, subtype: str = "PCM_16") -> None:
    """Write wave [channels, samples] at 48 kHz; the file appears under its name only when it is whole."""
    samples = wave.detach().cpu().numpy().T
    try:
        with whole_file(path) as temporary:
            # As bytes where names are bytes: soundfile encodes a text strictly, and not all are UTF-8.
            name = str(temporary) if os.name == "nt" else os.fsencode(temporary)
            soundfile.write(  # its stubs know no bytes
                name,  # pyright: ignore[reportArgumentType]
                samples,
                SAMPLE_RATE_HZ,
                subtype=subtype,
                format="WAV",
            )
    except (soundfile.SoundFileError, WriteError, RuntimeError) as error:
        raise AudioError(f"cannot write {path}: check that the folder is writable and not full") from error


def _existing_file(path: str | Path) -> Path:
    path = Path(path)
    if path.is_dir():
        raise AudioError(f"{path} is a folder; give an audio file (WAV, FLAC, OGG, MP3)")
    if not path.is_file():
        raise AudioError(f"{path} does not exist; check the path")
    return path


def _unreadable(path: Path) -> AudioError:
    return AudioError(f"{path} is not readable as audio; convert it to WAV or FLAC first")


def _to_channels(data: np.ndarray, channels: int | None) -> np.ndarray:
    if channels is None or data.shape[1] == channels:
        return data
    mono = data.mean(axis=1, keepdims=True)
    return np.repeat(mono, channels, axis=1)


def _to_length(data: np.ndarray, samples: int) -> np.ndarray:
    if data.shape[0] >= samples:
        return data[:samples]
    return np.pad(data, ((0, samples - data.shape[0]), (0, 0)))
