"""Whatever is flipped in a recording: reading ends in sound or in an AudioError, in bounded memory."""

import math

import numpy as np
import pytest
import torch

from duotok.recipes.evaluation.fuzz import damage, make_recording
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, audio_seconds, read_audio
from duotok.tokenizer.common.errors import AudioError

resource = pytest.importorskip("resource")
_ROOM_BYTES = 700_000_000  # what reading may take; a wave in memory has at most 200 MB
_FLIPS = 70


@pytest.fixture
def bounded_memory():
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + _ROOM_BYTES, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("kind", ["wav", "flac", "ogg", "mp3", "aiff", "caf", "m4a", "webm", "wma"])
@pytest.mark.usefixtures("bounded_memory")
def test_flipped_bits_end_in_sound_or_in_one_line(tmp_path, kind):
    generator = np.random.default_rng(7)
    path = tmp_path / f"song.{kind}"
    make_recording(path, 0.1 * generator.standard_normal((2, 4_000)), 16_000)
    whole = path.read_bytes()
    read, told = 0, []
    for _ in range(_FLIPS):
        path.write_bytes(damage(whole, kind, generator))
        try:
            wave = read_audio(path, tell=lambda line: told.append(line.isprintable()))
            assert wave.shape[0] == 2 and bool(torch.isfinite(wave).all())
            assert wave.shape[1] / SAMPLE_RATE_HZ <= math.ceil(audio_seconds(path))
            read += 1
        except AudioError as error:
            assert str(error).isprintable()
    assert 0 < read and all(told)
    assert read < _FLIPS or kind == "mp3"  # its frames stand each for itself
