"""The plan of a whole song: its time line, its keys, its sections, its chords."""

import numpy as np
import pytest

from duotok.lm.sheet.columns import CHORD, METERS, PLACE, PLACES
from duotok.lm.sheet.plan import Heard, plan_song
from duotok.lm.sheet.timeline import (
    TimeLine,
    find_meter,
    find_other_tempo,
    find_time_line,
    find_two_tempi,
    places_in,
)
from duotok.tokenizer.music.labels import CHORDS
from duotok.tokenizer.music.progressions import KEYS, load_progressions

RATE_HZ = 25.0


def say(choices: np.ndarray, count: int, sureness: float) -> np.ndarray:
    """Log-probabilities [frames, count] that favour these choices; of -1 nothing is said."""
    logits = np.zeros((len(choices), count))
    known = np.flatnonzero(choices >= 0)
    logits[known, choices[known]] = sureness
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def hear_places(beats: np.ndarray, frames: int, sureness: float = 2.0) -> np.ndarray:
    """What a good ear hears of beats in frames, four in a bar, the first a bar line."""
    turns = np.interp(np.arange(frames) + 0.5, beats, np.arange(len(beats)))
    return say((turns * 4).astype(int) % PLACES, PLACES, sureness)


def errors_ms(line: TimeLine, beats: np.ndarray) -> np.ndarray:
    """How far true beats are from the nearest of a time line."""
    return np.abs(line.beats[None] - beats[:, None]).min(axis=1) / RATE_HZ * 1000


@pytest.mark.parametrize("tempo_bpm", [62.0, 90.0, 100.3, 140.0, 180.0])
def test_one_tempo_is_found_through_long_pauses(tempo_bpm: float) -> None:
    beats = np.arange(-3, 9_000, 60 / tempo_bpm * RATE_HZ)
    place = hear_places(beats, 4_500)
    for first in (0, 2_000, 3_800):  # nobody sings for half a minute
        place[first : first + 700] = -np.log(PLACES)
    line = find_time_line(place, RATE_HZ)
    assert line.tempo_bpm == pytest.approx(tempo_bpm, rel=2e-4)
    inside = beats[(beats > 0) & (beats < 4_500)]
    assert errors_ms(line, inside).max() < 20
    assert len(set(np.diff(line.bar_lines).round(3))) == 1


@pytest.mark.parametrize("tempo_bpm", [90.0, 100.0, 120.0])
def test_a_given_tempo_and_downbeat_are_kept_for_ten_minutes(tempo_bpm: float) -> None:
    noise = np.random.default_rng(0).normal(size=(15_000, PLACES))
    place = noise - np.log(np.exp(noise).sum(axis=1, keepdims=True))
    line = find_time_line(place, RATE_HZ, tempo_bpm=tempo_bpm, downbeat_seconds=1.234)
    bars = (line.bar_lines / RATE_HZ - 1.234) / (240 / tempo_bpm)
    assert np.abs(bars - bars.round()).max() * 240 / tempo_bpm < 1e-3
    assert (line.beats[0] <= 0) and line.beats[-1] >= 15_000


@pytest.mark.parametrize("beats_per_bar", [2, 3, 6])
def test_bars_of_other_meters_are_counted(beats_per_bar: int) -> None:
    turns = (np.arange(2_000) + 30.5) / 48.3  # bars
    places, chords = (turns % 1 * PLACES).astype(int), turns.astype(int) % 2 * 7  # C G C G
    heard = Heard(
        place=say(places, PLACES, 2.0),
        chord=say(chords, CHORDS, 2.0),
        pitches=np.full(2_000, np.nan),
        rate_hz=RATE_HZ,
    )
    plan = plan_song(heard, beats_per_bar=beats_per_bar)
    assert plan.time_line.tempo_bpm == pytest.approx(60 * RATE_HZ * beats_per_bar / 48.3, rel=1e-3)
    assert np.diff(plan.time_line.bar_lines) == pytest.approx(48.3, rel=1e-3)
    assert (plan.sheet[:, [PLACE, CHORD]].numpy() == np.stack([places, chords], axis=1)).mean() > 0.95


@pytest.mark.parametrize("beats_per_bar", METERS)
def test_the_meter_is_heard_among_those_that_are_played(beats_per_bar: int) -> None:
    beats = np.arange(0, 1_600, 13.0)
    turns = np.interp(np.arange(1_500) + 0.5, beats, np.arange(len(beats))) / beats_per_bar
    told = np.stack([say((turns % 1 * PLACES).astype(int), PLACES, 1.0)] * len(METERS), axis=1)
    rng = np.random.default_rng(0)
    meter = rng.normal(size=(1_500, len(METERS))) + (np.array(METERS) == beats_per_bar)
    told += (meter - np.log(np.exp(meter).sum(axis=1, keepdims=True)))[:, :, None]
    assert find_meter(told, RATE_HZ) == beats_per_bar
    assert find_meter(told, RATE_HZ, among=(4,)) == 4
    place = places_in(told, beats_per_bar)
    assert np.exp(place).sum(axis=1) == pytest.approx(np.ones(1_500))
    line = find_time_line(place, RATE_HZ, beats_per_bar=beats_per_bar)
    assert line.tempo_bpm == pytest.approx(60 * RATE_HZ / 13, rel=1e-3)


def test_of_a_meter_that_nobody_learned_the_places_of_others_are_taken() -> None:
    told = np.full((100, len(METERS), PLACES), -np.inf)
    told[:, METERS.index(4)] = say(np.arange(100) // 4 % PLACES, PLACES, 2.0)
    assert find_meter(told, RATE_HZ) == 4
    for beats_per_bar in METERS:
        assert places_in(told, beats_per_bar) == pytest.approx(told[:, METERS.index(4)])


def test_beats_bend_with_the_singer() -> None:
    times = np.arange(4_500) / RATE_HZ
    beats_passed = (90 * times + (100 - 90) / 2 * times**2 / times[-1]) / 60  # from 90 to 100 BPM
    beats = np.interp(np.arange(int(beats_passed[-1])), beats_passed, times * RATE_HZ)
    line = find_time_line(hear_places(beats, 4_500), RATE_HZ)
    assert errors_ms(line, beats[4:-4]).max() < 70


def test_a_bar_of_two_beats_moves_the_bar_lines_and_not_the_beats() -> None:
    beats = np.arange(0, 3_100, 15.0)
    turns = (np.arange(3_000) + 0.5) / 15
    turns[1_500:] += 2  # a bar that lacks two beats
    line = find_time_line(say((turns * 4).astype(int) % PLACES, PLACES, 2.0), RATE_HZ)
    assert errors_ms(line, beats[beats < 3_000]).max() < 20
    assert sorted(set(np.diff(line.bar_lines).round())) in ([30, 60], [60, 90])


def test_half_or_double_is_named() -> None:
    beats = np.arange(0, 2_100, 60 / 70 * RATE_HZ)
    place = hear_places(beats, 2_000)
    eighths = hear_places(np.arange(0, 2_100, 30 / 70 * RATE_HZ), 2_000)
    line = find_time_line(np.logaddexp(place + np.log(0.6), eighths + np.log(0.4)), RATE_HZ)
    assert line.tempo_bpm == pytest.approx(70, rel=1e-3)
    other, share = find_other_tempo(np.logaddexp(place, eighths) - np.log(2), line)
    assert other == pytest.approx(140, rel=1e-3) and 0.2 < share < 0.8


def test_two_tempi_cut_together_are_told() -> None:
    halves = [hear_places(np.arange(0, 1_600, 60 / bpm * RATE_HZ), 1_500) for bpm in (80, 101)]
    for place, expected in ((np.concatenate(halves), (80, 101)), (np.concatenate([halves[0]] * 2), None)):
        told = find_two_tempi(place, find_time_line(place, RATE_HZ))
        assert told == (None if expected is None else pytest.approx(expected, rel=0.01))


@pytest.mark.parametrize("frames", [1, 2, 30])
def test_short_songs_have_a_plan(frames: int) -> None:
    heard = Heard(
        place=np.full((frames, PLACES), -np.log(PLACES)),
        chord=np.full((frames, CHORDS), -np.log(CHORDS)),
        pitches=np.full(2 * frames, np.nan),
        rate_hz=RATE_HZ,
    )
    plan = plan_song(heard)
    assert len(plan.sheet) == frames and not plan.has_singer
    assert plan.sheet[:, [PLACE, CHORD]].min() >= 0


def sing(bars: list[int | None], semitones: np.ndarray, rng: np.random.Generator) -> Heard:
    """A song at 100 BPM, bars of the melodies by number, None for nobody; chords I IV V I in C at first."""
    melodies = np.array([[0, 2, 4, 7], [9, 7, 5, 2], [7, 11, 2, 11], [4, 2, 0, 0]])
    chords = [0, 5, 7, 0]
    frames = 60 * len(bars)
    pitches, chord = np.full(2 * frames, np.nan), np.full(frames, -1)
    for bar, number in enumerate(bars):
        if number is not None:
            notes = 60 + (melodies[number] + semitones[bar]) % 12
            pitches[120 * bar : 120 * bar + 120] = np.repeat(notes, 30) + rng.normal(scale=0.1, size=120)
            chord[60 * bar : 60 * bar + 60] = (chords[number] + semitones[bar]) % 12
    told = say(chord, CHORDS, 2.0) + rng.normal(scale=1.5, size=(frames, CHORDS))
    told -= np.log(np.exp(told).sum(axis=1, keepdims=True))
    place = hear_places(np.arange(0, frames + 30, 15.0), frames, 1.0)
    return Heard(place=place, chord=told, pitches=pitches, rate_hz=RATE_HZ)


def test_key_and_chords_go_on_where_nobody_sings() -> None:
    rng = np.random.default_rng(1)
    bars = [None] * 8 + [0, 1, 2, 3] * 4 + [None] * 8 + [0, 1, 2, 3] * 4
    heard = sing(bars, np.zeros(len(bars), dtype=int), rng)
    plan = plan_song(heard)
    assert plan.has_singer and [key for _, _, key in plan.keys] == [0]
    chords = plan.sheet[:, CHORD].numpy().reshape(-1, 60)
    usual = np.array([0, 5, 7, 0] * 12)
    right = (chords == usual[:, None]).mean(axis=1)
    assert right[8:24].mean() > 0.95 and right[:8].mean() > 0.9 and right[24:32].mean() > 0.9
    again = plan.again.numpy()
    assert (again[: 24 * 60 - 60] == -1).any()
    second = again[33 * 60 : 47 * 60]  # the same eight bars and more, sung before
    assert (second >= 0).mean() > 0.9
    assert set((np.arange(33 * 60, 47 * 60) - second)[second >= 0] % 240) == {0}
    names = [section.name for section in plan.sections]
    assert names[0] == "intro" and "interlude" in names
    sung = [section for section in plan.sections if section.letter]
    assert {section.letter for section in sung} == {"A"}  # one melody all the time
    ends = [section.end for section in plan.sections]
    assert ends[-1] == len(plan.sheet) and [s.start for s in plan.sections] == [0, *ends[:-1]]


def test_a_key_changes_only_when_it_is_earned_or_given() -> None:
    rng = np.random.default_rng(2)
    bars: list[int | None] = [0, 1, 2, 3] * 20
    up = np.repeat([0, 1], 40)
    plan = plan_song(sing(bars, up, rng))
    assert [key for _, _, key in plan.keys] == [0, 1]
    assert abs(plan.keys[1][0] - 2_400) <= 100
    borrowed = np.zeros(80, dtype=int)
    borrowed[40:42] = 3
    assert [key for _, _, key in plan_song(sing(bars, borrowed, rng)).keys] == [0]
    assert [key for _, _, key in plan_song(sing(bars, up, rng), key=14).keys] == [14]


@pytest.mark.parametrize("kind", ["silence", "tone", "clicks"])
def test_what_is_no_singing_is_told(kind: str) -> None:
    pitches = np.full(2_000, np.nan)
    if kind == "tone":
        pitches[:] = 69.0
    elif kind == "clicks":
        pitches[::100] = 50.0
    even = {"place": (1_000, PLACES), "chord": (1_000, CHORDS)}
    told = {name: np.full(shape, -np.log(shape[1])) for name, shape in even.items()}
    assert not Heard(**told, pitches=pitches, rate_hz=RATE_HZ).has_singer


def test_tables_say_the_same_in_every_key() -> None:
    tables = load_progressions()
    assert np.exp(tables.chords).sum(axis=1) == pytest.approx(np.ones(KEYS), abs=1e-3)
    assert tables.chords[2, 9] == tables.chords[0, 7]  # the dominant of D and of C
    assert tables.changes[2, 9, 2] == tables.changes[0, 7, 0] > tables.changes[0, 7, 6]
    assert tables.pitches[14, 2] == tables.pitches[12, 0] > tables.pitches[12, 1]
