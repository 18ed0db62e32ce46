"""Reading any recording as float32 at 48 kHz, resampling, and writing waves safely."""

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import soundfile
import soxr
import torch
from torch import Tensor

from .decoding_media import decode_media
from .errors import AudioError
from .files import WriteError, open_input, shown_name, whole_file
from .long_waves import blocks, let_go, map_blocks, new_wave

SAMPLE_RATE_HZ = 48_000
AUDIO_ENDINGS = tuple(".wav .flac .ogg .oga .opus .mp3 .aif .aiff .au .caf .w64 .rf64".split())
MEDIA_ENDINGS = (*AUDIO_ENDINGS, *".m4a .aac .mp4 .mov .webm .wma".split())  # by `read_audio` alone
LOWEST_RATE_HZ, HIGHEST_RATE_HZ = 4_000, 768_000  # of recordings; others are headers that lie
# Samples per byte; silence in FLAC or Opus has some 300 to 3,000. What claims more has a damaged header.
_HIGHEST_COMPRESSION = 5_000
_READ_SAMPLES = 1 << 20  # of all channels together, at once
_PIECE_FRAMES = 1 << 12  # what libsndfile is asked for by who is patient: at a fault, as much is lost
_ENDLESS_BYTES = 0x7FFFF000  # sizes from here on are written by what does not know the length yet
_LARGEST_WAV_BYTES = 4_000_000_000


def audio_seconds(path: str | Path, *, most_seconds: float = math.inf) -> float:
    """Return the length of a recording in seconds, from its header; of one above most_seconds, any above it.

    Where the header does not say it, the recording is decoded, but not further than it has to be.
    """
    with _open(path, most_seconds=most_seconds) as file:
        return file.frames / file.samplerate


def read_audio(
    path: str | Path,
    *,
    channels: int | None = 2,
    start_seconds: float = 0.0,
    seconds: float | None = None,
    tell: Callable[[str], None] | None = None,
) -> Tensor:
    """Read a recording (or a cut of it) as float32 [channels, samples] at 48 kHz.

    channels: 1 averages, 2 copies a mono recording to both sides and folds more than two channels down to
    their mean on both sides, None keeps what the file has. The result has round(frames * 48000 / rate)
    samples; a long one rests on disk (see `long_waves`). Of a file that is cut off, what is there.

    tell: is given a line for whatever of the sound is not there; without it, damage is an error. Raises
    AudioError when the file is missing, not audio, empty or holds NaN or infinite samples.
    """
    with _open(path, tell) as file:
        cut = _plan_cut(file, start_seconds, seconds)
        expected = _resampled_length(cut.frames, file.samplerate)
        wave = new_wave(channels or file.channels, expected)
        done = 0
        for block in _read_at_48_khz(file, path, cut, channels, tell):
            wave[:, done : done + len(block)] = torch.from_numpy(block.T)
            done += len(block)
            let_go(wave)
    return wave if done == expected else map_blocks(torch.clone, wave[:, :done])


def stream_audio(path: str | Path, block_samples: int) -> Iterator[Tensor]:
    """Blocks float32 [2, block_samples] at 48 kHz, the last one shorter: what `read_audio` gives."""
    waiting: list[np.ndarray] = []
    count = 0
    with _open(path) as file:
        for data in _read_at_48_khz(file, path, _plan_cut(file), channels=2):
            waiting.append(data)
            count += len(data)
            while count >= block_samples:
                joined = np.concatenate(waiting)
                yield _to_tensor(joined[:block_samples])
                waiting, count = [joined[block_samples:]], count - block_samples
    if count:
        yield _to_tensor(np.concatenate(waiting))


def resample(wave: Tensor, from_hz: float, to_hz: float, samples: int | None = None) -> Tensor:
    """wave [..., n] at from_hz -> [..., samples] float32 at to_hz, on its device; no gradients pass.

    samples: round(n * to_hz / from_hz) by default. What is missing at the end is silence; at equal rates the
    wave is only cut or lengthened.
    """
    length = _resampled_length(wave.shape[-1], from_hz, to_hz) if samples is None else samples
    flat = wave.detach().float().cpu().reshape(-1, wave.shape[-1]).numpy().T  # [n, channels]
    if from_hz != to_hz:
        flat = soxr.resample(np.ascontiguousarray(flat), from_hz, to_hz)
    return _to_tensor(_to_length(flat, length)).reshape(*wave.shape[:-1], length).to(wave.device)


def resample_blocks(parts: Iterable[np.ndarray], from_hz: float, to_hz: float) -> Iterator[np.ndarray]:
    """Blocks [n, channels] at from_hz -> blocks at to_hz: joined they are what one pass over all gives."""
    resampler: soxr.ResampleStream | None = None
    given = made = channels = 0
    for part in parts:
        given, channels = given + len(part), part.shape[1]
        if from_hz != to_hz:
            resampler = resampler or soxr.ResampleStream(from_hz, to_hz, channels, dtype="float32")
            part = resampler.resample_chunk(np.ascontiguousarray(part, dtype=np.float32))
            made += len(part)
        yield part
    if resampler is not None:
        rest = resampler.resample_chunk(np.zeros((0, channels), np.float32), last=True)
        yield _to_length(rest, max(0, _resampled_length(given, from_hz, to_hz) - made))


def change_speed(wave: Tensor, speed: float) -> Tensor:
    """Return wave [channels, samples] played faster, as a tape is: [channels, round(samples / speed)]."""
    return wave if speed == 1.0 else resample(wave, SAMPLE_RATE_HZ * speed, SAMPLE_RATE_HZ)


def write_audio(path: str | Path, wave: Tensor, *, subtype: str = "PCM_16") -> None:
    """Write wave [channels, samples] at 48 kHz; the file appears under its name only when it is whole.

    A FLAC or MP3 where it is called so, else a WAV. 16 bits are dithered, the same way every time.
    """
    size = wave.numel() * (2 if subtype == "PCM_16" else 4)
    kind = "WAV" if size <= _LARGEST_WAV_BYTES else "RF64"  # WAV counts its bytes in 32 bits
    kind = {".flac": "FLAC", ".mp3": "MP3"}.get(Path(path).suffix.lower(), kind)
    best: dict[str, Any] = {"compression_level": 0.0, "bitrate_mode": "VARIABLE"} if kind == "MP3" else {}
    generator = np.random.default_rng(0)
    try:
        with (
            whole_file(path) as temporary,
            open(temporary, "wb") as raw,
            soundfile.SoundFile(
                _handle(raw, temporary), "w", SAMPLE_RATE_HZ, len(wave), subtype, None, kind, False, **best
            ) as file,
        ):
            for _, (block,) in blocks(wave.detach()):
                data = block.cpu().numpy().T
                file.write(_dithered(data, generator) if subtype == "PCM_16" else data)
    except (soundfile.SoundFileError, WriteError, RuntimeError) as error:
        raise AudioError(
            f"cannot write {shown_name(path)}: check that the folder is writable and not full"
        ) from error


def _dithered(data: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """data in 16 bits: an even noise instead of distortion; what 16 bits hold, as silence, stays as it is."""
    steps = data.astype(np.float32) * 32_768
    noise = generator.random(data.shape, np.float32) - generator.random(data.shape, np.float32)
    dithered = np.round(steps + noise * (steps != np.round(steps)))
    return dithered.clip(-32_768, 32_767).astype(np.int16)


class _Cut(NamedTuple):
    start: int  # frames at the recording's own rate
    frames: int
    start_seconds: float


@contextmanager
def _open(
    path: str | Path, tell: Callable[[str], None] | None = None, most_seconds: float = math.inf
) -> Iterator[soundfile.SoundFile]:
    """Open a recording whose header can be true; AudioError for all that goes wrong with it."""
    name = shown_name(path)
    with open_input(path, wanted="an audio file (WAV, FLAC, MP3, M4A, OGG)", error=AudioError) as raw:
        size = os.fstat(raw.fileno()).st_size
        if size == 0:
            raise AudioError(f"{name} is an empty file, not readable as audio; give a recording with sound")
        try:
            with _open_decoded(raw, path, size, tell or (lambda _: None), most_seconds) as file:
                if not LOWEST_RATE_HZ <= file.samplerate <= HIGHEST_RATE_HZ:
                    raise AudioError(
                        f"{name} says that it has {file.samplerate} samples a second; give a recording of "
                        f"{LOWEST_RATE_HZ} to {HIGHEST_RATE_HZ}"
                    )
                if file.format != "RAW" and file.frames > size * _HIGHEST_COMPRESSION:
                    raise AudioError(
                        f"{name} says that it has {file.frames} samples, which {size} bytes cannot hold; "
                        "export it again from your audio editor"
                    )
                yield file
        # TypeError, ValueError: a name that ends in .raw, a file that cannot be gone through.
        except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
            raise AudioError(f"{name} is not readable as audio; convert it to WAV or FLAC first") from error


def _open_decoded(
    raw: BinaryIO, path: str | Path, size: int, tell: Callable[[str], None], most_seconds: float
) -> soundfile.SoundFile:
    """Open by soundfile, or by FFmpeg what that does not know, or does not know the length of."""
    name, most = shown_name(path), size * _HIGHEST_COMPRESSION
    try:
        file = soundfile.SoundFile(_handle(raw, path), closefd=False)
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError):
        if decoded := decode_media(raw, name, most, tell, most_seconds):
            return decoded
        raise
    # After each read soundfile seeks, which is not exact in an MP3: what is read piece by piece has gaps.
    if (file.format == "MP3" or file.frames == 0) and (
        decoded := decode_media(raw, name, most, tell, most_seconds)
    ):
        return decoded
    if found := re.search(r"(?:data|SSND) *: (\d+) \(should be (\d+)\)", file.extra_info):
        claimed, there = map(int, found.groups())
        if there < claimed < _ENDLESS_BYTES:
            seconds = file.frames / file.samplerate
            tell(f"{name} ends at {seconds:.1f} of {seconds * claimed / there:.1f} s")
    return file


def _plan_cut(file: soundfile.SoundFile, start_seconds: float = 0.0, seconds: float | None = None) -> _Cut:
    start = min(max(0, round(start_seconds * file.samplerate)), max(0, file.frames))
    rest = max(0, file.frames - start)
    frames = rest if seconds is None else min(rest, round(seconds * file.samplerate))
    return _Cut(start=start, frames=frames, start_seconds=start_seconds)


def _read_at_48_khz(
    file: soundfile.SoundFile,
    path: str | Path,
    cut: _Cut,
    channels: int | None,
    tell: Callable[[str], None] | None = None,
) -> Iterator[np.ndarray]:
    """Blocks float32 [n, channels] of a cut; AudioError where it is empty or not finite."""
    name = shown_name(path)
    limit = max(1, _READ_SAMPLES // file.channels)

    def read() -> Iterator[np.ndarray]:
        if cut.start:
            file.seek(cut.start)
        left = cut.frames
        while left > 0:
            data = _read_block(file, min(left, limit), is_patient=tell is not None)
            if not len(data):  # shorter than its header says
                break
            if not np.isfinite(data).all():
                raise AudioError(
                    f"{name} holds NaN or infinite samples; export it again from your audio editor"
                )
            left -= len(data)
            yield _to_channels(data, channels)
        if left == cut.frames:
            raise AudioError(
                f"{name} has no samples at {cut.start_seconds:g} s; give a recording that has sound"
            )
        if left and tell is not None:
            end = (cut.start + cut.frames - left) / file.samplerate
            tell(f"{name} ends at {end:.1f} of {file.frames / file.samplerate:.1f} s")

    yield from resample_blocks(read(), file.samplerate, SAMPLE_RATE_HZ)


def _read_block(file: soundfile.SoundFile, frames: int, *, is_patient: bool) -> np.ndarray:
    """The next samples float32 [n, channels], fewer at the end or, for who is patient, at a fault."""
    data = np.empty((frames, file.channels), dtype=np.float32)
    # soundfile seeks after each read, for which FLAC is decoded again: in pieces only where those are kept.
    size = _PIECE_FRAMES if is_patient else frames
    for start in range(0, frames, size):
        piece = data[start : start + size]
        try:
            count = len(file.read(out=piece))
        except soundfile.SoundFileError:
            if not is_patient:
                raise
            count = 0
        if count < len(piece):
            return data[: start + count]
    return data


def _handle(file: BinaryIO, path: str | Path) -> int | str:
    """What libsndfile opens: the number of an open file, so that what it is called plays no part."""
    return file.fileno() if os.name != "nt" else str(path)  # libraries on Windows do not share such numbers


def _resampled_length(samples: int, from_hz: float, to_hz: float = SAMPLE_RATE_HZ) -> int:
    return round(samples * to_hz / from_hz)


def _to_channels(data: np.ndarray, channels: int | None) -> np.ndarray:
    if channels is None or data.shape[1] == channels:
        return data
    # Not by np.mean, which takes ten times as long over an axis as short as this.
    mono = reduce(np.add, data.T) / data.shape[1]
    return np.repeat(mono[:, None], channels, axis=1)


def _to_length(data: np.ndarray, samples: int) -> np.ndarray:
    if data.shape[0] >= samples:
        return data[:samples]
    return np.pad(data, ((0, samples - data.shape[0]), (0, 0)))


def _to_tensor(data: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(data.T))
