"""Mixing: levels, rooms, and stems that sum to the mix and do not clip."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from duotok.recipes.corpus.popband.rendering import (
    active_level,
    color,
    compress,
    finish,
    frame_levels,
    make_room,
    mix_stems,
    normalize,
)

CHANNELS = {"vocal": 1, "drums": 2, "bass": 1, "other": 2}
VALUES = st.floats(-100, 100, width=32, allow_nan=False)
STEMS = {
    stem: arrays.arrays(np.float32, (channels, 64), elements=VALUES) for stem, channels in CHANNELS.items()
}


def tone(seconds: float = 2.0, frequency: float = 440.0, channels: int = 1) -> np.ndarray:
    wave = np.sin(2 * np.pi * frequency * np.arange(int(seconds * 48_000)) / 48_000)
    return np.tile(wave.astype(np.float32), (channels, 1))


@pytest.mark.parametrize("seed", range(4))
def test_a_mix_has_the_levels_of_pop(seed: int):
    rng = np.random.default_rng(seed)
    band = {stem: rng.normal(0, 0.2, (2, 96_000)).astype(np.float32) for stem in ("drums", "bass", "other")}
    mix = mix_stems(tone()[0], band, rng)
    voice = mix.stems["vocal"][:, 0] / 32_768
    rest = (mix.mix - mix.stems["vocal"]) / 32_768
    assert -26 < 20 * np.log10(voice.std()) < -14
    assert -7 < 20 * np.log10(rest.std() / voice.std()) < 8
    assert [(stem, wave.shape[1]) for stem, wave in mix.stems.items()] == list(CHANNELS.items())


def test_silent_stems_stay_silent():
    band = {stem: np.zeros((2, 48_000), np.float32) for stem in ("drums", "bass")}
    band["other"] = tone(1.0, 220, 2)
    mix = mix_stems(tone(1.0)[0], band, np.random.default_rng(0))
    assert not mix.stems["drums"].any() and not mix.stems["bass"].any()
    assert mix.stems["other"].any()


def test_active_level_ignores_pauses():
    wave = tone(2.0)
    wave[:, 48_000:] = 0
    assert active_level(wave) == pytest.approx(1 / np.sqrt(2), rel=0.01)
    assert active_level(normalize(wave, 0.1)) == pytest.approx(0.1, rel=0.01)
    assert active_level(np.zeros((1, 100), np.float32)) == 0.0
    assert frame_levels(np.full((2, 48), 0.5, np.float32), 2_400) == pytest.approx([0.5])


def test_compression_lowers_peaks_only():
    wave = tone(2.0) * np.where(np.arange(96_000) < 48_000, 0.05, 0.5).astype(np.float32)
    pressed = compress(wave, 4.0)
    before = wave[0, 60_000:].std() / wave[0, 10_000:40_000].std()
    after = pressed[0, 60_000:].std() / pressed[0, 10_000:40_000].std()
    assert after < before
    assert compress(wave, 1.0) is wave


def test_color_keeps_time_and_length():
    click = np.zeros((2, 24_000), np.float32)
    click[:, 5_000] = 1
    for wet in (None, -20.0):
        result = color(click, 0.4, wet, np.random.default_rng(0), low_cut_hz=40)
        assert result.shape == click.shape
        assert np.abs(result).argmax(axis=1).tolist() == [5_000, 5_000]
    # Before the click there is only the equalizer's short reach, after it the room.
    assert np.square(result[:, :2_900]).sum() < 1e-4 * np.square(result[:, 5_300:]).sum()


def test_a_room_has_its_level_and_decays():
    room = make_room(0.5, -12.0, np.random.default_rng(0))
    assert 10 * np.log10(np.square(room).sum()) == pytest.approx(-12, abs=0.1)
    assert np.square(room[:8_000]).sum() > 30 * np.square(room[-8_000:]).sum()


@settings(deadline=None, max_examples=60)
@given(st.fixed_dictionaries(STEMS))
def test_stems_sum_to_the_mix_sample_by_sample(stems):
    mix = finish(stems)
    total = sum(np.broadcast_to(wave.astype(int), (64, 2)) for wave in mix.stems.values())
    assert np.array_equal(total, mix.mix)
    assert mix.mix.dtype == np.int16
    assert max(np.abs(wave.astype(int)).max() for wave in (*mix.stems.values(), mix.mix)) <= 32_767


def test_loud_stems_are_scaled_not_clipped():
    loud = np.full((2, 1_000), 3.0, np.float32)
    mix = finish({"vocal": loud[:1], "drums": -loud, "bass": loud[:1], "other": loud})
    assert mix.stems["vocal"].max() == -mix.stems["drums"].min() > 10_000
