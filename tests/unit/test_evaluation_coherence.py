"""Coherence measures on hand-made chords, clicks and silence."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from duotok.recipes.evaluation import heard_coherence as coherence
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError

SECONDS = 8
CHORDS = ((60, 64, 67), (65, 69, 72), (67, 71, 74), (60, 64, 67))  # C F G C, two seconds each
NOTES = [(2.0 * i, 2.0 * i + 1.8, chord[i % 3], "la") for i, chord in enumerate(CHORDS)]


def play_chords(transpose: int = 0) -> torch.Tensor:
    time = torch.arange(2 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    pitches = [[440 * 2 ** ((pitch + transpose - 69) / 12) for pitch in chord] for chord in CHORDS]
    waves = [sum(0.1 * torch.sin(2 * torch.pi * hertz * time) for hertz in chord) for chord in pitches]
    return torch.cat(waves).repeat(2, 1)


def play_clicks(times: np.ndarray) -> torch.Tensor:
    wave = torch.zeros(2, 12 * SAMPLE_RATE_HZ)
    noise = torch.randn(600, generator=torch.Generator().manual_seed(0)) * torch.exp(-torch.arange(600) / 100)
    for time in times:
        start = round(time * SAMPLE_RATE_HZ)
        wave[:, start : start + 600] = 0.5 * noise
    return wave


@pytest.fixture(scope="module")
def pitches() -> np.ndarray:
    return coherence.pitches_of_notes(NOTES, SECONDS * SAMPLE_RATE_HZ)


def test_chord_tones_are_in_harmony_and_a_band_in_a_far_key_is_not(pitches):
    chroma = coherence.energy_chroma(play_chords())
    # Each of three equal notes has 12 / 3 = 4, less what the filters leak into the neighbouring semitones.
    assert 2.5 < coherence.measure_harmony(chroma, pitches) < 4.0
    assert coherence.measure_in_key(chroma, pitches) == 1.0
    far = coherence.energy_chroma(play_chords(transpose=6))
    assert coherence.measure_harmony(far, pitches) < 0.4 and coherence.measure_in_key(far, pitches) < 0.5
    nothing = coherence.pitches_of_notes([], SECONDS * SAMPLE_RATE_HZ)
    assert coherence.measure_harmony(chroma, nothing) == coherence.measure_in_key(chroma, nothing) == 0.0


def test_noise_has_harmony_of_chance_and_silence_scores_zero(pitches):
    wave = torch.randn(2, SECONDS * SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(1)) * 0.1
    assert coherence.measure_harmony(coherence.energy_chroma(wave), pitches) == pytest.approx(1.0, abs=0.2)
    singing = coherence.Singing(pitches=pitches, beats_seconds=np.arange(0, 8, 0.5))
    result = coherence.measure_coherence(singing, coherence.listen_to(0 * wave))
    assert (result.harmony, result.in_key, result.beat_f) == (0.0, 0.0, 0.0)


def test_beats_tracked_in_clicks_are_the_clicks():
    times = np.arange(0.3, 11.6, 0.5)
    tracked = coherence.track_beats(play_clicks(times))
    assert coherence.measure_beat_f(tracked, times, 12.0) == 1.0
    assert coherence.measure_beat_f(tracked, times + 0.25, 12.0) == 0.0


def test_beat_f_counts_hits_and_misses_by_hand():
    reference = np.array([0.2, 2.0, 3.0, 4.0, 5.0, 9.9])  # the first and last are too near to the borders
    estimated = np.array([2.05, 3.0, 4.2, 5.0])
    # 3 hits of 4 estimates and 4 references
    assert coherence.measure_beat_f(estimated, reference, 10.0) == pytest.approx(0.75)


def test_notes_become_frames_from_the_start_of_the_excerpt():
    pitches = coherence.pitches_of_notes([(1.0, 1.5, 61, "la")], SAMPLE_RATE_HZ, start_seconds=0.9)
    assert np.flatnonzero(np.isfinite(pitches)).tolist() == list(range(2, 12))
    assert set(pitches[2:12]) == {61.0}


def test_pitch_of_a_recorded_voice_is_found():
    time = torch.arange(SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    voice = sum(torch.sin(2 * torch.pi * 220 * k * time) / k for k in range(1, 9))[None] * 0.1
    found = coherence.pitches_of_wave(torch.cat([voice, torch.zeros(1, SAMPLE_RATE_HZ)], dim=1))
    assert np.nanmedian(found[3:17]) == pytest.approx(57, abs=0.2)
    assert np.isnan(found[24:]).all()


@given(st.lists(st.integers(0, 6), min_size=2, max_size=30))
def test_every_item_meets_another_song_once(numbers):
    songs = [str(number) for number in numbers]
    if max(songs.count(song) for song in songs) * 2 > len(songs):
        with pytest.raises(DataError, match="two songs"):
            coherence.pair_with_others(songs)
        return
    partners = coherence.pair_with_others(songs)
    assert sorted(partners) == list(range(len(songs)))
    assert all(songs[index] != songs[partner] for index, partner in enumerate(partners))
