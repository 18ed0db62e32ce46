"""Singing from a made-up voice bank: pitch, times and syllables follow the score."""

import shutil
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from duotok.recipes.corpus.popband.lyrics import find_nearest, transcribe_lyrics
from duotok.recipes.corpus.popband.singers import (
    Singer,
    add_third,
    call_by_phone,
    draw_singer,
    speak_phrases,
    vary_manner,
)
from duotok.recipes.corpus.popband.singing import (
    MELISMA,
    Manner,
    assign_lyrics,
    bend_pitch,
    draw_manner,
    make_pulses,
    map_time,
    pitch_curve,
    sing,
)
from duotok.recipes.corpus.popband.voicebank import (
    BANDS,
    NOISE_BANDS,
    Syllable,
    VoiceBank,
    expand_envelope,
    expand_noise,
    load_bank,
    save_bank,
    split_syllables,
    trim_vowels,
)
from duotok.recipes.corpus.popband.voices import VOICES, Sound, voices_of_split
from duotok.recipes.corpus.scores.song import Note
from duotok.tokenizer.common.errors import DataError

UNTIDY = ("formant", "consonants", "trend_semitones", "slides", "falls", "hum")
STEADY = Manner(vibrato_semitones=0.0, drift_semitones=0.0, scoop=0.0, melisma=0.0, breaths=0.0)
RATE_HZ = 48_000


def make_bank() -> VoiceBank:
    """Ten syllables of 0.3 s: 60 ms of noise, then a vowel."""
    frames = 600
    inside = (np.arange(frames) % 60) >= 12
    envelope = np.where(inside[:, None], -8.0, -14.0) - np.linspace(0, 6, BANDS)
    noise = np.where(inside[:, None], np.linspace(0, 0.4, NOISE_BANDS), 1.0)
    times = [{"onset": 0.3 * n, "vowel_start": 0.3 * n + 0.06, "vowel_end": 0.3 * n + 0.3} for n in range(10)]
    syllables = tuple(
        Syllable(phrase=n // 5, coda=0.3 * n + 0.3, text="sa", **own) for n, own in enumerate(times)
    )
    parts = {"envelope": envelope.astype(np.float16), "noise": noise.astype(np.float16), "voiced": inside}
    return VoiceBank(rate_hz=24_000, syllables=syllables, **parts)


def make_notes() -> tuple[Note, ...]:
    pitches = (57, 60, 64, 69, 62)
    return tuple(
        Note(start=0.5 + 0.6 * n, end=1.1 + 0.6 * n, pitch=pitch, velocity=80)
        for n, pitch in enumerate(pitches)
    )


def strongest_period(wave: np.ndarray, expected_hz: float) -> float:
    """Frequency of the autocorrelation's best lag within a fifth of the expected one."""
    spectrum = np.fft.rfft(wave, 2 * len(wave))
    correlation = np.fft.irfft(np.square(np.abs(spectrum)))
    low, high = int(RATE_HZ / expected_hz / 1.2), int(RATE_HZ / expected_hz * 1.2)
    lag = low + int(correlation[low:high].argmax())
    left, center, right = correlation[lag - 1 : lag + 2]
    return RATE_HZ / (lag + 0.5 * (left - right) / (left - 2 * center + right))


def test_the_sung_pitch_is_the_written_one_and_rests_are_silent():
    wave, texts = sing(make_notes(), make_bank(), STEADY, 4.0, np.random.default_rng(0))
    assert wave.shape == (4 * RATE_HZ,) and wave.dtype == np.float32 and np.isfinite(wave).all()
    assert texts == ["sa"] * 5
    quiet = 1e-3 * np.abs(wave).max()
    assert max(np.abs(wave[: int(0.3 * RATE_HZ)]).max(), np.abs(wave[int(3.8 * RATE_HZ) :]).max()) < quiet
    for note in make_notes():
        part = wave[int((note.start + 0.15) * RATE_HZ) : int((note.end - 0.15) * RATE_HZ)]
        expected = 440 * 2 ** ((note.pitch - 69) / 12)
        assert abs(1200 * np.log2(strongest_period(part, expected) / expected)) < 20


def test_the_same_seed_sings_the_same():
    manner = draw_manner(np.random.default_rng(1), 1.0)
    waves = [sing(make_notes(), make_bank(), manner, 4.0, np.random.default_rng(s))[0] for s in (3, 3, 4)]
    assert np.array_equal(waves[0], waves[1]) and not np.array_equal(waves[0], waves[2])


def test_vowels_start_with_their_notes():
    sung, _ = assign_lyrics(make_notes(), make_bank(), STEADY, np.random.default_rng(0))
    source, owner, _ = map_time(sung, 800)
    for index, note in enumerate(make_notes()):
        frame = round(note.start * 200)
        assert owner[frame] == index
        assert source[frame] / 200 == pytest.approx(sung[index].syllable.vowel_start, abs=0.006)
    assert (source[:80] == -1).all() and (source[-60:] == -1).all()


def test_a_melisma_holds_the_syllable():
    manner = Manner(melisma=1.0)
    sung, texts = assign_lyrics(make_notes(), make_bank(), manner, np.random.default_rng(0))
    assert texts == ["sa"] + [MELISMA] * 4
    assert len(sung) == 1 and sung[0].end == make_notes()[-1].end


def test_pitch_glides_end_on_the_notes_and_vibrato_has_its_depth():
    notes = (Note(start=0.5, end=2.5, pitch=60, velocity=80), Note(start=2.5, end=5.0, pitch=67, velocity=80))
    steady = pitch_curve(notes, [], 1_000, STEADY, np.random.default_rng(0))
    assert steady[200:440] == pytest.approx(60, abs=0.06)
    assert steady[560:] == pytest.approx(67, abs=0.06)
    assert steady[500] == pytest.approx(63.5, abs=2.0)
    manner = Manner(vibrato_semitones=0.3, drift_semitones=0.0, scoop=0.0)
    sung = pitch_curve(notes, [], 1_000, manner, np.random.default_rng(0))
    assert np.ptp(sung[300:480]) == pytest.approx(0.6, abs=0.1)


def test_pulses_have_unit_power_no_mean_and_stop_unvoiced():
    voiced = np.r_[np.ones(200, bool), np.zeros(200, bool)]
    pulses = make_pulses(np.full(400, 200.0), voiced, 400 * 240)
    inside = pulses[4_800:43_200]
    assert np.square(inside).mean() == pytest.approx(1.0, rel=0.1)
    assert abs(inside.mean()) < 1e-3
    assert np.abs(pulses[200 * 240 + 480 :]).max() < 1e-6


def test_the_expansion_moves_formants():
    peak = np.zeros(BANDS + 1)
    peak[60] = 1.0
    bins = [float((peak @ expand_envelope(24_000, factor)).argmax()) for factor in (0.9, 1.0, 1.2)]
    assert bins[0] / bins[1] == pytest.approx(0.9, rel=0.02)
    assert bins[2] / bins[1] == pytest.approx(1.2, rel=0.02)
    assert expand_noise(24_000).sum(axis=0) == pytest.approx(1.0)


def test_words_are_split_into_syllables():
    letters = "beki"
    sounds = [Sound(word=0, symbol=s, start=0.1 * n, end=0.1 * (n + 1)) for n, s in enumerate(letters)]
    sounds.append(Sound(word=1, symbol="s", start=0.4, end=0.5))  # no vowel: not a syllable
    found = split_syllables(tuple(sounds), 3, 10.0)
    assert [s.text for s in found] == ["be", "ki"]
    assert found[1].onset == pytest.approx(10.2) and found[1].vowel_start == pytest.approx(10.3)


def test_vowels_are_trimmed_to_their_clear_part():
    voiced = np.zeros(60, bool)
    voiced[10:30] = True
    level = np.where(np.arange(60) < 25, 0.0, -5.0)
    whole = Syllable(phrase=0, onset=0.0, vowel_start=0.04, vowel_end=0.2, coda=0.2, text="a")
    silent = Syllable(phrase=0, onset=0.2, vowel_start=0.2, vowel_end=0.3, coda=0.3, text="u")
    trimmed = trim_vowels([whole, silent], voiced, level)
    assert [(s.vowel_start, s.vowel_end) for s in trimmed] == [pytest.approx((0.05, 0.125))]


def test_banks_are_cached_and_broken_caches_named(tmp_path: Path):
    path, bank = tmp_path / "voice.npz", make_bank()
    save_bank(path, bank)
    loaded = load_bank(path)
    assert loaded.syllables == bank.syllables and np.array_equal(loaded.envelope, bank.envelope)
    path.write_bytes(b"broken")
    with pytest.raises(DataError, match="voice.npz"):
        load_bank(path)


def test_there_are_enough_voices_and_held_out_ones_stay_out_of_training():
    train = {voice.name for voice in voices_of_split("train")}
    test = {voice.name for voice in voices_of_split("test")}
    assert len(VOICES) == len({voice.name for voice in VOICES}) >= 8
    assert train < test and len(test - train) >= 2


def test_the_pitch_drifts_slides_falls_and_is_spoken():
    notes = (Note(start=0.5, end=2.5, pitch=60, velocity=80), Note(start=2.5, end=4.5, pitch=67, velocity=80))
    flat = np.where(np.arange(1_000) < 500, 60.0, 67.0)

    def bend(spoken: frozenset[int] = frozenset(), **manner: float) -> np.ndarray:
        return bend_pitch(flat.copy(), notes, replace(STEADY, **manner), spoken, np.random.default_rng(0))

    assert np.array_equal(bend(), flat)
    trend = bend(trend_semitones=0.5) - flat
    assert trend[:100].mean() < -0.2 and trend[-100:].mean() > 0.2
    slid = bend(slides=1.0)
    assert np.diff(slid).max() < 1 and slid[700] == 67 and slid[400] == 60
    assert bend(falls=1.0)[898] < 66.5 and bend(falls=1.0)[:850] == pytest.approx(flat[:850])
    spoken = bend(spoken=frozenset([1])) - flat
    assert not spoken[:500].any() and np.ptp(spoken[500:900]) > 0.5


@pytest.mark.parametrize("kind, text", [("vowel", "a"), ("nasal", "m")])
def test_humming_has_one_sound(kind: str, text: str):
    waves, texts = {}, []
    for hum in ("", kind):
        manner = replace(STEADY, hum=hum)
        waves[hum], texts = sing(make_notes(), make_bank(), manner, 4.0, np.random.default_rng(0))
    assert texts == [text] * 5
    bright = {hum: np.square(np.abs(np.fft.rfft(wave)[16_000:])).sum() for hum, wave in waves.items()}
    assert bright[kind] < (1.3 if kind == "vowel" else 0.02) * bright[""]


def test_phrases_are_spoken_about_a_low_pitch():
    notes = tuple(replace(note, start=note.start + (index > 2)) for index, note in enumerate(make_notes()))
    notes = tuple(replace(note, end=note.end + (index > 2)) for index, note in enumerate(notes))
    seen = set()
    for seed in range(8):
        spoken, indices = speak_phrases(notes, 0.5, 50, np.random.default_rng(seed))
        seen.add(indices)
        for index, (before, after) in enumerate(zip(notes, spoken, strict=True)):
            assert abs(after.pitch - 55) < 7 if index in indices else after == before
    assert {frozenset(), frozenset([0, 1, 2]), frozenset([3, 4])} <= seen


@pytest.mark.parametrize(
    "key, pitch, third", [("C:maj", 60, 64), ("C:maj", 62, 65), ("A:min", 69, 72), ("C:maj", 61, 64)]
)
def test_the_second_singer_is_a_third_above_in_the_key(key: str, pitch: int, third: int):
    notes = tuple(replace(note, pitch=pitch) for note in make_notes())
    second = add_third(notes, key, np.random.default_rng(0))
    assert {note.pitch for note in second} == {third}
    assert all(0 < abs(a.start - b.start) < 0.03 for a, b in zip(notes, second, strict=True))


def test_a_phone_has_a_narrow_band_and_leaves_silence():
    noise = np.random.default_rng(0).normal(0, 0.1, RATE_HZ).astype(np.float32)
    heard = np.square(np.abs(np.fft.rfft(call_by_phone(noise, np.random.default_rng(1)))))
    assert (
        heard[500:2_500].mean() > 30 * heard[8_000:].mean()
        and heard[500:2_500].mean() > 30 * heard[:80].mean()
    )
    assert not call_by_phone(np.zeros(100, np.float32), np.random.default_rng(1)).any()


def test_most_singers_are_tidy_and_each_thing_is_heard():
    rng = np.random.default_rng(0)
    singers = [draw_singer(rng) for _ in range(400)]
    manners = [vary_manner(STEADY, rng) for _ in range(400)]
    for drawn, tidy in ((singers, Singer()), (manners, STEADY)):
        for name in (each.name for each in fields(tidy)):
            share = np.mean([getattr(each, name) != getattr(tidy, name) for each in drawn])
            changes = isinstance(tidy, Singer) or name in UNTIDY
            assert 0.02 < share < 0.7 if changes else share == 0, name


@pytest.mark.skipif(shutil.which("espeak-ng") is None, reason="espeak-ng is not installed")
def test_the_words_of_a_score_are_sung_by_the_syllables_most_like_them():
    texts = ("Ro-", "ses", "-", "", "süß!")
    notes = tuple(replace(note, text=text) for note, text in zip(make_notes(), texts, strict=True))
    words = transcribe_lyrics(notes, "de")
    assert words[2:4] == [MELISMA, ""]
    made = make_bank()
    sounds = ("la", "zes", "ɹo", "wim", "siːs", "mu", "ki", "ka", "pon", "tɑ")
    syllables = tuple(replace(s, text=text) for s, text in zip(made.syllables, sounds, strict=True))
    sung, heard = assign_lyrics(
        notes, replace(made, syllables=syllables), Manner(melisma=1.0), np.random.default_rng(0), words
    )
    assert [*heard[:3], heard[4]] == ["ɹo", "zes", MELISMA, "siːs"]
    assert [event.start for event in sung][:2] == [note.start for note in notes[:2]]


@pytest.mark.parametrize("ipa, nearest", [("biː", "pi"), ("TOk", "dot"), ("ʃɑn", "san")])
def test_the_nearest_syllable_has_the_vowel_first(ipa: str, nearest: str):
    texts = ("ba", "pi", "but", "dot", "san", "ʃin")
    assert texts[find_nearest(texts, ipa)] == nearest
