"""Whatever is flipped in a recording: reading ends in sound or in an AudioError, in bounded memory."""

import math
import os
import signal

import numpy as np
import pytest
import torch

from duotok.recipes.accompany.mix import load_vocal
from duotok.recipes.evaluation.fuzz import damage, fuzz, make_recording, try_loading
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


def test_damaged_recordings_of_all_kinds_are_loaded_or_refused():
    found = fuzz(140, seed=11)
    assert found["faults"] == [] and found["longest_seconds"] < 10 and found["largest_megabytes"] < 1_000
    assert all(
        set(each) == {"sound", "refused"} and sum(each.values()) == 20 for each in found["kinds"].values()
    )


def test_faults_are_found_and_what_comes_after_them_is_loaded(tmp_path, monkeypatch, make_singing):
    monkeypatch.setattr("duotok.recipes.evaluation.fuzz.LONGEST_SECONDS", 0.3)
    good = tmp_path / "good.wav"
    make_recording(good, make_singing(1.2, rate_hz=16_000).T, 16_000)

    def load(path):
        if path.name == "crash":
            os.kill(os.getpid(), signal.SIGKILL)
        while path.name == "slow":
            pass
        if path.name == "large":
            return bytearray(8_000_000_000)
        if path.name == "fault":
            raise ValueError
        return load_vocal(path)

    names = ["good.wav", "crash", "slow", "good.wav", "large", "fault", "missing.wav"]
    outcomes = [outcome for outcome, _, _ in try_loading([tmp_path / name for name in names], load)]
    assert outcomes == ["sound", "crash", "hang", "sound", "memory", "crash", "refused"]
