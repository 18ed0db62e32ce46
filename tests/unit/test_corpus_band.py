"""Excerpts and the band: everything stays inside the excerpt and on its chords."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import mido
import numpy as np
import pytest

from duotok.recipes.corpus.popband.band import DRUM_KEYS, STYLES, Band, Style, styles_for
from duotok.recipes.corpus.popband.grooves import Grooves
from duotok.recipes.corpus.scores.song import (
    RING_SECONDS,
    Excerpt,
    Note,
    Song,
    Span,
    cut_excerpt,
    label_chords,
    whole_song,
)
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import parse_chord

every_style = pytest.mark.parametrize(
    "style", STYLES, ids=lambda style: f"{style.name}-{style.beats_per_bar}"
)


def make_song(beats: int = 240, beat_seconds: float = 0.5, beats_per_bar: int = 4) -> Song:
    seconds = beats * beat_seconds
    labels = ("C:maj", "A:min7", "F:maj/3", "G:7", "N")
    chords = tuple(
        Span(start=start, end=start + 2.0, label=labels[int(start / 2) % 5])
        for start in np.arange(0.0, seconds, 2.0)
    )
    notes = tuple(
        Note(start=start, end=start + 0.4, pitch=60 + index % 12, velocity=80)
        for index, start in enumerate(np.arange(8.0, seconds, 0.5))
    )
    return Song(
        name="001",
        melody=notes,
        piano=notes,
        beats=tuple(np.arange(beats) * beat_seconds),
        downbeats=tuple(range(0, beats, beats_per_bar)),
        chords=chords,
        keys=(
            Span(start=0.0, end=seconds / 2, label="C:maj"),
            Span(start=seconds / 2, end=seconds, label="D:maj"),
        ),
    )


def make_excerpt(seed: int = 0, stretch: float = 1.1, semitones: int = 3, beats_per_bar: int = 4) -> Excerpt:
    song = make_song(beats_per_bar=beats_per_bar)
    return cut_excerpt(song, np.random.default_rng(seed), stretch=stretch, semitones=semitones)


@pytest.mark.parametrize("seed", range(6))
def test_an_excerpt_is_a_moved_stretch_of_the_song(seed: int):
    excerpt = make_excerpt(seed)
    assert 30 <= excerpt.seconds <= 60
    assert excerpt.beats[0] == pytest.approx(0.0) and excerpt.downbeats[0] == 0
    assert np.diff(excerpt.beats) == pytest.approx(0.55)
    assert excerpt.melody[0].start <= 8.0
    assert all(0 <= note.start < note.end <= excerpt.seconds + 1e-9 for note in excerpt.melody)
    assert excerpt.key in ("Eb:maj", "F:maj")
    sung = sum(note.end - note.start for note in excerpt.melody)
    assert sung >= 0.4 * excerpt.seconds


def test_chords_cover_the_excerpt_without_gaps():
    excerpt = make_excerpt()
    assert excerpt.chords[0].start == 0 and excerpt.chords[-1].end == pytest.approx(excerpt.seconds)
    for left, right in zip(excerpt.chords, excerpt.chords[1:], strict=False):
        assert left.end == right.start and left.label != right.label
    assert all("/" not in label for _, _, label in label_chords(excerpt))


@every_style
def test_every_style_plays_inside_the_excerpt(style: Style):
    for seed in range(3):
        excerpt = make_excerpt(seed, beats_per_bar=style.beats_per_bar)
        stems = Band(excerpt, style, np.random.default_rng(seed)).arrange()
        assert sorted(stems) == ["bass", "drums", "other"]
        for part in [part for parts in stems.values() for part in parts]:
            for start, end, pitch, velocity in part.notes:
                assert 0 <= start < end and start < excerpt.seconds
                assert 0 <= pitch <= 127 and 1 <= velocity <= 127
        assert stems["bass"][0].notes and stems["other"][0].notes


@every_style
def test_the_bass_plays_chord_tones_and_rests_without_a_chord(style: Style):
    excerpt = make_excerpt(1, beats_per_bar=style.beats_per_bar)
    for start, _, pitch, _ in Band(excerpt, style, np.random.default_rng(1))._bass().notes:
        spans = [span for span in excerpt.chords if span.start - 0.03 <= start < span.end + 0.03]
        chords = [parse_chord(span.label) for span in spans]
        tones = {(chord[0] + tone) % 12 for chord in chords if chord for tone in chord[1]}
        assert pitch % 12 in tones


@every_style
def test_a_whole_song_has_its_rests_and_rings_out(style: Style):
    # 127 s, sung from 8 s on; the last bar begins with the last chord, G:7.
    song = make_song(beats=254, beats_per_bar=style.beats_per_bar)
    whole = whole_song(song, stretch=1.1, semitones=2)
    length = 126.9 + RING_SECONDS  # the last note's end
    assert whole.seconds == pytest.approx(1.1 * length, abs=0.1) and whole.melody[0].start > 8
    assert [span.label for span in whole.keys] == ["D:maj", "E:maj"] and whole.key == "D:maj"
    assert whole.keys[1].start == pytest.approx(1.1 * 127.0 / 2)
    assert whole.chords[-1].label == "A:7" and whole.chords[-1].end == whole.seconds
    last = whole.last_bar_seconds
    assert last == pytest.approx(1.1 * 126.0) and len(whole.beats) == 254
    stems = Band(whole, style, np.random.default_rng(0)).arrange()
    strokes = [note for part in stems["drums"] for note in part.notes if note[0] > last - 0.02]
    assert (
        sorted(note[2] for note in strokes) == [DRUM_KEYS["kick"], DRUM_KEYS["crash"]] or not stems["drums"]
    )
    struck = [note for note in stems["bass"][0].notes if note[0] > last - 0.02]
    assert len(struck) == 1 and struck[0][1] > last + 0.7 * (whole.seconds - last)


@pytest.mark.parametrize("stretch, seconds", [(0.5, 120.0), (3.0, 300.0)])
def test_whole_songs_last_2_to_5_minutes(stretch: float, seconds: float):
    assert whole_song(make_song(beats=300), stretch=stretch, semitones=0).seconds == pytest.approx(seconds)
    with pytest.raises(DataError, match="song 001 lasts 63 s; whole songs last 120 to 300 s"):
        whole_song(make_song(beats=120), stretch=1.0, semitones=0)


def test_the_same_seed_gives_the_same_arrangement():
    first, second, other = (
        Band(make_excerpt(), STYLES[1], np.random.default_rng(seed)).arrange()["drums"] for seed in (5, 5, 6)
    )
    assert first == second != other


def test_drums_fall_on_the_beats():
    excerpt = make_excerpt(2)
    style = next(style for style in STYLES if style.name == "disco")
    part = Band(excerpt, style, np.random.default_rng(3))._drums()
    kicks = [
        start for start, _, pitch, velocity in part.notes if pitch == DRUM_KEYS["kick"] and velocity > 90
    ]
    assert kicks
    beats = np.array(excerpt.beats)
    assert max(np.abs(beats - kick).min() for kick in kicks) < 0.03


@every_style
def test_patterns_are_written_in_their_alphabets(style: Style):
    steps = {3: 12, 6: 12}.get(style.beats_per_bar, 8 if style.name == "march" else 16)
    for variant in style.drums:
        assert set(variant) <= set(DRUM_KEYS)
        assert all(len(strokes) == steps and set(strokes) <= set("Xxo.") for strokes in variant.values())
    assert all(len(pattern) == steps and set(pattern) <= set("R538A.") for pattern in style.bass)
    assert all(len(pattern) == steps and set(pattern) <= set("Ddm.012345") for pattern in style.comping)


@pytest.mark.parametrize("meter, name", [(2, "march"), (3, "waltz"), (6, "slow_six")])
def test_bars_of_a_meter_begin_with_the_kick(meter: int, name: str):
    (style,) = (style for style in styles_for(meter) if style.name == name)
    excerpt = make_excerpt(beats_per_bar=meter)
    bars = [excerpt.beats[index] for index in excerpt.downbeats]
    part = Band(excerpt, style, np.random.default_rng(3))._drums()
    kicks = [start for start, _, pitch, loud in part.notes if pitch == DRUM_KEYS["kick"] and loud > 100]
    on_bar = [min(abs(bar - kick) for bar in bars) < 0.03 for kick in kicks]
    assert sum(on_bar) > 0.6 * len(bars) and (name == "march" or all(on_bar))


@pytest.mark.parametrize("seed", range(6))
def test_the_chords_of_a_lead_sheet_are_always_played(seed: int):
    excerpt = replace(make_excerpt(), piano=())
    for style in (replace(STYLES[1], comping_share=0.0, pad_share=0.0), STYLES[seed]):
        other = Band(excerpt, style, np.random.default_rng(seed)).arrange()["other"]
        assert other and all(part.notes for part in other)


@pytest.mark.parametrize("seed", range(12))
def test_breaks_silence_stems_but_never_all_nor_the_last_bar(seed):
    excerpt = make_excerpt()
    whole = Band(excerpt, STYLES[1], np.random.default_rng(seed)).arrange()
    band = Band(excerpt, STYLES[1], np.random.default_rng(seed), breaks=True)
    stems = band.arrange()
    notes = {stem: sum(len(part.notes) for part in parts) for stem, parts in stems.items()}
    assert sum(notes.values()) <= sum(len(part.notes) for parts in whole.values() for part in parts)
    for bar in range(band.bars):
        start = min(step.start for step in band.steps if step.bar == bar) - 0.03
        end = max(step.end for step in band.steps if step.bar == bar)
        sounding = [
            note
            for parts in stems.values()
            for part in parts
            for note in part.notes
            if start < note[1] and note[0] < end
        ]
        assert sounding, f"bar {bar} is silent"


def test_breaks_are_heard_in_some_bands():
    counts = [
        [
            sum(
                len(part.notes)
                for parts in Band(make_excerpt(), STYLES[1], np.random.default_rng(seed), breaks=on)
                .arrange()
                .values()
                for part in parts
            )
            for on in (False, True)
        ]
        for seed in range(12)
    ]
    assert 2 <= sum(with_breaks < full for full, with_breaks in counts) <= 11


def write_grooves(path: Path) -> Path:
    """Groove MIDI of one rock performance of 8 bars at 100, 20 ticks late, and one without notes."""
    lines = ["style,bpm,beat_type,time_signature,midi_filename,split"]
    with tarfile.open(path, "w:gz") as archive:

        def add(name: str, content: bytes) -> None:
            member = tarfile.TarInfo(f"groove/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))

        for name, beats in (("drummer1/1.mid", 32), ("drummer1/2.mid", 0)):
            track = mido.MidiTrack()
            for beat in range(beats):  # the tom is struck by its rim
                note = 58 if beat in (15, 31) else (36, 38)[beat % 2]
                track.append(
                    mido.Message("note_on", note=note, velocity=60 + beat, time=20 if beat == 0 else 470)
                )
                track.append(mido.Message("note_off", note=note, time=10))
            buffer = io.BytesIO()
            mido.MidiFile(ticks_per_beat=480, tracks=[track]).save(file=buffer)
            add(name, buffer.getvalue())
            lines.append(f"rock/fast,100,beat,4-4,{name},train")
        add("info.csv", "\n".join([*lines, "rock,fast,beat,4-4,drummer1/1.mid,train", "rock"]).encode())
    return path


def test_a_drummer_plays_along_with_the_beats(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr("duotok.recipes.corpus.popband.band.GROOVE_SHARE", 1.0)
    grooves = Grooves(write_grooves(tmp_path / "groove.tar.gz"))
    style = next(style for style in STYLES if style.name == "rock")
    excerpt = make_excerpt()  # at 109
    beats = np.array(excerpt.beats)
    for seed in range(4):
        band = Band(excerpt, style, np.random.default_rng(seed), grooves=grooves)
        part = band._drums()
        played = [note for note in part.notes if note[2] != DRUM_KEYS["crash"]]
        assert len(played) > 0.5 * len(beats)
        nearest = np.array([np.abs(beats - start).argmin() for start, *_ in played])
        late = [start for start, *_ in played] - beats[nearest]
        assert late == pytest.approx(0.55 * 20 / 480, abs=1e-6)  # as late as the drummer is
        is_tom = np.array([pitch == 43 for _, _, pitch, _ in played])
        assert np.array_equal(is_tom, nearest % 16 == 15)
        assert [loud for *_, loud in played] == list(60 + nearest % 32)
    assert capsys.readouterr().err.count("drummer1/2.mid has no notes; left out") == 1
    assert grooves.draw("reggae", 4, 100, np.random.default_rng(0)) is None
    assert grooves.draw("rock", 4, 150, np.random.default_rng(0)) is None
    with pytest.raises(DataError, match="not Groove MIDI"):
        Grooves(tmp_path)
