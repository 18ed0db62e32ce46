"""Whatever is flipped in a recording: reading ends in sound or in an AudioError, in bounded memory."""

import math

import numpy as np
import pytest
import soundfile
import torch

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, audio_seconds, read_audio
from duotok.tokenizer.common.errors import AudioError

resource = pytest.importorskip("resource")
_ROOM_BYTES = 700_000_000  # what reading may take; a wave in memory has at most 200 MB
_FLIPS = 150


@pytest.fixture
def bounded_memory():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff", "caf"])
@pytest.mark.usefixtures("bounded_memory")
def test_flipped_bits_end_in_sound_or_in_one_line(tmp_path, kind):
    generator = np.random.default_rng(7)
    path = tmp_path / f"song.{kind}"
    soundfile.write(path, 0.1 * generator.standard_normal((4_000, 2)), 16_000)
    whole = path.read_bytes()
    read = 0
    for number in range(_FLIPS):
        data = bytearray(whole)
        reach = min(len(data), 128 if number % 2 else len(data))  # the head half of the time
        for place in generator.integers(reach, size=1 + number % 7):
            data[place] ^= 1 << int(generator.integers(8))
        path.write_bytes(_with_checksums(data) if kind == "ogg" else data)
        try:
            wave = read_audio(path)
            assert wave.shape[0] == 2 and bool(torch.isfinite(wave).all())
            assert wave.shape[1] / SAMPLE_RATE_HZ <= math.ceil(audio_seconds(path))
            read += 1
        except AudioError as error:
            assert str(error).isprintable()
    assert 0 < read < _FLIPS


def _with_checksums(data: bytearray) -> bytes:
    """An OGG file whose pages are taken for whole again."""
    pages = data.split(b"OggS")
    for number, page in enumerate(pages):
        if len(page) > 22:
            page[18:22] = bytes(4)
            sum_ = 0
            for byte in b"OggS" + page:
                sum_ = (sum_ << 8 & 0xFFFFFFFF) ^ _TABLE[sum_ >> 24 ^ byte]
            pages[number][18:22] = sum_.to_bytes(4, "little")
    return b"OggS".join(pages)


def _remainder(value: int) -> int:
    for _ in range(8):
        value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
    return value


_TABLE = [_remainder(byte << 24) for byte in range(256)]
