"""What soundfile cannot read, decoded by FFmpeg's libraries (PyAV): AAC, Opus, WMA, the sound of a film.

It comes out as a file of no name that soundfile reads, so that all else is as with any recording.
"""

import math
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, BinaryIO

import soundfile

from .errors import AudioError
from .long_waves import roomy_folder

if TYPE_CHECKING:
    from av.container import InputContainer

# Containers of recordings; others, such as playlists, would have FFmpeg open files that nobody named.
_CONTAINERS = "mov,matroska,asf,aac,amr,ac3,aiff,avi,caf,flac,flv,mp3,mpeg,mpegts,ogg,wav,w64,wv"
_PADDING_SAMPLES = 4_096  # that a coder may leave behind the end: two of its longest frames
_TOLERANCE_SECONDS = 0.1  # of the length in a header, beside padding
_LATE_MS = 25  # how much coder and decoder put before an MP3: 1,105 samples
_HEAD_BYTES = 4_096
_ASF_PROPERTIES = bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365")
_BYTES_PER_SAMPLE = 4


def decode_media(
    file: BinaryIO,
    name: str,
    most_samples: int,
    tell: Callable[[str], None],
    most_seconds: float = math.inf,
) -> soundfile.SoundFile | None:
    """Return the first sound of an open file, at its own rate; None where there is none.

    name: of the file, for messages; most_samples, most_seconds: about where decoding stops; tell: is given a
    line for whatever of the sound is not there. Raises AudioError where the disk has no room.
    """
    import av
    from av.error import FFmpegError

    folder = roomy_folder()
    try:
        sound = tempfile.TemporaryFile(dir=folder)
        file.seek(0)
        options = {"format_whitelist": _CONTAINERS}
        with av.open(file, "r", metadata_errors="ignore", options=options) as container:
            if not container.streams.audio:
                return None
            rate_hz, channels, samples, damaged = _decode(container, sound, most_samples, most_seconds)
            is_endless = container.format.name == "mp3" and not _tells_length(file)
            claimed = 0 if is_endless else round(_claimed_seconds(container, file) * rate_hz)
    except (FFmpegError, ValueError):  # what is no container, or too damaged a one
        return None
    except OSError as error:
        raise AudioError(
            f"{folder} has no room for the sound of {name}: make room there or set TMPDIR to a folder on "
            "another disk"
        ) from error
    if not samples:
        return None
    if 0 < samples - claimed < _PADDING_SAMPLES:
        sound.truncate(claimed * channels * _BYTES_PER_SAMPLE)
    is_short = claimed - samples > _TOLERANCE_SECONDS * rate_hz
    seconds = samples / rate_hz
    if is_endless:
        tell(f"{name} does not say how long it is: it has {seconds:.1f} s and begins {_LATE_MS} ms late")
    if damaged > is_short:  # the piece that a cut went through is one
        tell(f"{name} is damaged: {damaged} pieces of it could not be decoded and are left out")
    if is_short:
        tell(f"{name} ends at {seconds:.1f} of {claimed / rate_hz:.1f} s")
    sound.seek(0)
    return soundfile.SoundFile(sound, "r", rate_hz, channels, "FLOAT", "LITTLE", "RAW")


def _decode(
    container: "InputContainer", sound: BinaryIO, most_samples: int, most_seconds: float
) -> tuple[int, int, int, int]:
    """Write floats [samples, channels] into a file; return rate, channels, samples, packets left out."""
    import av
    from av.error import FFmpegError

    rate_hz = channels = samples = damaged = 0
    resampler = None
    packets = container.demux(audio=0)
    while samples <= min(most_samples, most_seconds * (rate_hz or 1) + _PADDING_SAMPLES):
        try:
            packet = next(packets, None)
        except FFmpegError:  # what follows cannot be told apart
            break
        if packet is None:
            break
        try:
            for frame in packet.decode():
                if resampler is None:
                    rate_hz, channels = frame.sample_rate, frame.layout.nb_channels
                    resampler = av.AudioResampler("flt", frame.layout, rate_hz)
                for part in resampler.resample(frame):
                    sound.write(part.to_ndarray().tobytes())
                    samples += part.samples
        except (FFmpegError, ValueError):  # ValueError: a frame of another rate or layout
            damaged += 1
    return rate_hz, channels, samples, damaged


def _tells_length(file: BinaryIO) -> bool:
    """Whether the first frame of an MP3 counts the others, as coders let it since about 2000."""
    file.seek(0)
    head, size = file.read(10), 0
    if head[:3] == b"ID3":
        for byte in head[6:]:
            size = size << 7 | byte
        file.seek(10 + size)
    start = head + file.read(_HEAD_BYTES)
    return any(mark in start for mark in (b"Xing", b"Info", b"VBRI"))


def _claimed_seconds(container: "InputContainer", file: BinaryIO) -> float:
    """What the header says; 0 where it says nothing, or where FFmpeg guesses by the number of bytes."""
    stream = container.streams.audio[0]
    if container.format.name == "asf":  # of one that is cut off, FFmpeg has but a guess
        file.seek(0)
        said = file.read(_HEAD_BYTES).partition(_ASF_PROPERTIES)[2]
        ticks, before_ms = (int.from_bytes(said[at : at + 8], "little") for at in (48, 64))
        return ticks / 1e7 - before_ms / 1e3
    if container.format.name == "aac":
        return 0.0
    if stream.duration is not None and stream.time_base is not None:
        return float(stream.duration * stream.time_base)
    return (container.duration or 0) / 1e6
