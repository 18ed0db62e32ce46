"""song.mid, lead-sheet.musicxml, chords.lab and click.wav, opened again by programs of others."""

import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import mido
import numpy as np
import pytest
import torch

from duotok.recipes.accompany import request as requests
from duotok.recipes.accompany.bundle import assemble_bundle
from duotok.recipes.accompany.export import (
    Outline,
    find_sung_notes,
    place_on_grid,
    split_at_beats,
    write_exports,
)
from duotok.recipes.accompany.output import EXPORTED
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.accompany.request import INSTALLED, Request
from duotok.recipes.accompany.wishes import read_chart
from duotok.renderer import sound_font
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.music.score_reader import Note


def make_report(
    beats_per_bar: int,
    *,
    start: float = 0.0,
    bars: int = 6,
    bpm: float = 96.0,
    bend: float = 0.0,
    trust: float = 0.8,
) -> dict[str, Any]:
    """The report of a song in F that ends inside a bar; bend: by how much its tempo comes and goes."""
    steps = 60 / bpm * (1 + bend * np.sin(np.arange(bars * beats_per_bar) / 8))
    beats = [round(time, 3) for time in (start + np.concatenate([[0], np.cumsum(steps)])).tolist()]
    seconds, lines = round(beats[-1] + 0.3, 6), beats[::beats_per_bar]
    beats = [round(time, 3) for time in np.arange(start, 0, -60 / bpm).tolist()[:0:-1]] + beats
    chords = [
        [0.0, lines[1], "A#:maj"],
        [lines[1] + 0.02, lines[2] + 0.02, "N"],
        [lines[2], seconds, "D:min"],
    ]
    return {
        "seconds": seconds,
        "beats_seconds": beats,
        "accompaniment_key": "C:maj",
        "band": {"style": "soul"},
        "lead_sheet": {
            "trust": {"bars": trust},
            "bar_lines_seconds": lines,
            "keys": [[0.0, lines[3], "F:maj"], [lines[3], seconds, "E:min"]],
            "chords": chords,
        },
    }  # fmt: skip


SONGS = {
    "steady": make_report(4),
    "pick-up": make_report(4, start=1.3),
    "free": make_report(4, start=0.31, bend=0.05, bars=16),
    "waltz": make_report(3, start=0.5, bpm=150),
    "six": make_report(6, start=0.8, bpm=180),
    "two": make_report(2, bpm=180),
    "short": make_report(4, bars=3) | {"seconds": 2.0},
}
SONGS["short"]["lead_sheet"] |= {"bar_lines_seconds": [0.0], "keys": None, "chords": [[0.0, 2.0, "?"]]}
SONGS["short"]["beats_seconds"] = SONGS["short"]["beats_seconds"][:3]


def play(report: dict[str, Any]) -> tuple[dict[str, list[Note]], list[Note]]:
    """A note of each stem on every beat, struck again before it ends, and a melody over the bar lines."""
    beats = report["beats_seconds"]
    score = {
        "drums": [Note(beat, beat + 0.1, 36, 100) for beat in beats],
        "bass": [Note(beat, beat + 3.0, 41, 80) for beat in beats],
        "other": [Note(beat, beat + 0.3, pitch, 60) for beat in beats for pitch in (60, 65)],
    }
    melody = [Note(first + 0.1, last + 0.15, 73, 90) for first, last in zip(beats, beats[1:], strict=False)]
    return score, melody[::2]


@pytest.fixture(scope="module", params=SONGS)
def song(request, tmp_path_factory) -> tuple[dict[str, Any], Path]:
    report, folder = SONGS[request.param], tmp_path_factory.mktemp("export")
    write_exports(tuple(EXPORTED), folder, "", report, *play(report))
    return report, folder


def test_midi_follows_the_bars(song):
    report, folder = song
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        pretty_midi = pytest.importorskip("pretty_midi")
        warnings.simplefilter("error")
        opened = pretty_midi.PrettyMIDI(str(folder / "song.mid"))
    file = mido.MidiFile(folder / "song.mid")
    assert file.type == 1 and file.length == pytest.approx(report["seconds"], abs=0.02)
    lines = np.array(report["lead_sheet"]["bar_lines_seconds"])
    downbeats = opened.get_downbeats()
    assert np.abs(downbeats[:, None] - lines[None]).min(axis=0).max() < 0.005
    assert len(downbeats) <= len(lines) + 2
    score, melody = play(report)
    for track, notes in zip(opened.instruments, (*score.values(), melody), strict=True):
        starts = sorted(note.start for note in track.notes)
        assert starts == pytest.approx(sorted(note.start for note in notes), abs=0.005)
    assert [track.program for track in opened.instruments] == [0, 33, 4, 53]
    assert [track.is_drum for track in opened.instruments] == [True, False, False, False]
    bass = opened.instruments[1].notes
    assert all(a.end <= b.start + 1e-6 for a, b in zip(bass, bass[1:], strict=False))
    tempi = [message for message in file.tracks[0] if message.type == "set_tempo"]
    assert len(tempi) <= 2 or report is SONGS["free"]


def test_midi_and_sheet_are_spelled_in_the_key(song):
    music21 = pytest.importorskip("music21")
    report, folder = song
    if report is SONGS["short"]:
        return
    events = list(mido.MidiFile(folder / "song.mid").tracks[0])
    assert [event.text for event in events if event.type == "marker"] == ["Bb", "N.C.", "Dm"]
    assert [event.key for event in events if event.type == "key_signature"] == ["F", "Em"]
    sheet = music21.converter.parse(folder / "lead-sheet.musicxml")
    symbols = [symbol.figure for symbol in sheet.recurse().getElementsByClass("ChordSymbol")]
    assert symbols == ["B-", "N.C.", "Dm"]
    assert [each.sharps for each in sheet.recurse().getElementsByClass("KeySignature")] == [-1, 1]
    names = {
        note.pitch.nameWithOctave for note in sheet.recurse().notes if isinstance(note, music21.note.Note)
    }
    assert names == {"D-5", "C#5"}
    chart = [label for *_, label in read_chart(folder / "chords.lab")]
    assert chart == ["Bb:maj", "N", "D:min"]


def test_the_sheet_has_whole_bars(song):
    music21 = pytest.importorskip("music21")
    report, folder = song
    sheet = music21.converter.parse(folder / "lead-sheet.musicxml")
    bars = list(sheet.parts[0].getElementsByClass("Measure"))
    has_pickup = report["lead_sheet"]["bar_lines_seconds"][0] > 0
    assert bars[0].number == 1 - has_pickup
    for bar in bars:
        assert bar.highestTime == bar.barDuration.quarterLength - bar.paddingLeft
    if report is SONGS["six"]:
        meters = [each.ratioString for each in sheet.recurse().getElementsByClass("TimeSignature")]
        assert meters == ["6/8"] and bars[0].highestTime == 1.0
    # One note after another, whose ties belong together, and none hides a beat.
    notes = list(sheet.recurse().getElementsByClass("Note"))
    held = [each.tie.type if each.tie else "" for each in notes]
    for (one, it), (other, then) in pairwise(zip(notes, held, strict=True)):
        assert (it in ("start", "continue")) == (then in ("stop", "continue"))
        assert it not in ("start", "continue") or one.pitch == other.pitch
    for each in [*notes, *sheet.recurse().getElementsByClass("Rest")]:
        assert len(each.duration.components) == 1


@pytest.mark.parametrize(
    ("first", "last", "group", "spans"),
    [
        (0, 7, 4, [(0, 4), (4, 7)]),
        (3, 9, 4, [(3, 4), (4, 8), (8, 9)]),
        (2, 6, 4, [(2, 6)]),  # a syncopation
        (2, 7, 4, [(2, 4), (4, 7)]),
        (0, 5, 6, [(0, 4), (4, 5)]),
        (4, 12, 6, [(4, 6), (6, 12)]),
        (0, 14, 4, [(0, 12), (12, 14)]),
        (5, 5, 4, []),
    ],
)
def test_what_is_written_shows_the_beats(first, last, group, spans):
    assert split_at_beats(first, last, group) == spans


def test_chords_go_back_in_and_clicks_are_on_the_beats(song):
    report, folder = song
    chart = read_chart(folder / "chords.lab")
    assert chart[0][0] == 0 and chart[-1][1] == pytest.approx(report["seconds"], abs=1e-3)
    assert all(a[1] == b[0] for a, b in zip(chart, chart[1:], strict=False))
    wave = read_audio(folder / "click.wav", channels=1)[0]
    assert len(wave) == round(report["seconds"] * SAMPLE_RATE_HZ)
    for beat in report["beats_seconds"][report["lead_sheet"]["bar_lines_seconds"][0] > 0 :]:
        at = round(beat * SAMPLE_RATE_HZ)
        before, behind = (
            wave[max(at + low, 0) : max(at + high, 0)].abs() for low, high in ((-2_000, -100), (0, 400))
        )
        assert behind.max() > 0.3 > (before.max() if len(before) else 0.0)


@pytest.mark.parametrize("trust", [0.8, 0.1])
def test_the_grid_keeps_swing_and_takes_chance(trust):
    rng = np.random.default_rng(0)
    report = make_report(4, bars=16, bpm=100, trust=trust)
    outline, sixteenth = Outline.of_report(report), 0.15
    swing = np.array([0.0, 0.02, 0.0, 0.02]) + 0.01  # the whole stem is late as well
    exact = np.arange(256) * sixteenth + np.tile(swing, 64)
    played = exact + rng.uniform(-0.015, 0.015, size=256)
    triplet = 7.8 + 0.6 / 3 * 2 + 0.002
    notes = [Note(start, start + 0.1, 42, 80) for start in sorted([*played.tolist()])]
    found = place_on_grid({"drums": notes, "bass": [Note(triplet, triplet + 0.2, 30, 80)] + [
        Note(time, time + 0.2, 40, 80) for time in np.arange(0, 38, 0.6).tolist()
    ]}, outline)  # fmt: skip
    starts = np.array([note.start for note in found["drums"]])
    if trust < 0.4:
        assert starts == pytest.approx(np.sort(played))
        return
    assert np.abs(starts - exact).max() < 0.006 < np.abs(np.sort(played) - exact).max()
    assert min(abs(note.start - triplet) for note in found["bass"]) < 0.05


def test_sung_notes_are_found():
    time = np.arange(100) / 50
    vibrato = 0.4 * np.sin(2 * np.pi * 5.5 * time)
    gap = np.full(10, np.nan)
    pitches = np.concatenate(
        [gap, 60.3 + vibrato[:50], 62.2 + vibrato[:40], gap, [70.0, 70.0], gap, np.full(20, 55.0)]
    )
    found = find_sung_notes(pitches)
    assert [note.pitch for note in found] == [60, 62, 55]
    starts = [0.2, 1.2, 2.44]
    assert [note.start for note in found] == pytest.approx(starts, abs=0.07)
    assert found[-1].end == pytest.approx(2.84) and find_sung_notes(np.full(9, np.nan)) == []


def test_the_band_is_exported_and_played(tiny_bundle, font, tmp_path, monkeypatch):
    pytest.importorskip("tinysoundfont", reason="tinysoundfont is not installed")
    accompanist = Accompanist.from_pretrained(tiny_bundle)
    time = torch.arange(3 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    vocal = 0.3 * torch.sin(2 * torch.pi * (226 + 3 * torch.sin(30 * time)) * time)[None]
    request = Request(
        vocal=vocal, export=tuple(EXPORTED), play=font, variations=2, steps=1, tempo_bpm=120.0, tuning=30.0
    )
    report = accompanist.write(request.read(), tmp_path)
    names = {"song-1.mid", "song-2.mid", "lead-sheet.musicxml", "chords.lab", "click.wav"}
    assert names <= set(report["files"] if "files" in report else [path.name for path in tmp_path.iterdir()])
    notes = [
        m for track in mido.MidiFile(tmp_path / "song-2.mid").tracks for m in track if m.type == "note_on"
    ]
    assert len(notes) > 10 and {message.channel for message in notes} >= {0, 1, 9}
    played = [read_audio(tmp_path / f"played{part}-2.wav") for part in ("", "-drums", "-bass", "-keys")]
    assert (played[0] - sum(played[1:])).abs().max() < 1e-3 and played[0].shape == (2, vocal.shape[-1])
    levels = [
        measure_loudness(read_audio(tmp_path / f"{name}-2.wav")) for name in ("played", "accompaniment")
    ]
    assert levels[0] == pytest.approx(levels[1], abs=2.0)
    monkeypatch.setattr(sound_font, "SOUND_FONT_FOLDERS", ())
    best = accompanist.accompany(request, variations=1, export=("lab",), play=INSTALLED)
    assert not best.played and any("no sound font" in warning for warning in best.report["warnings"])
    assert (best.save(tmp_path / "best") / "chords.lab").exists() and not (
        tmp_path / "best" / "song.mid"
    ).exists()


def test_what_cannot_be_exported_is_told_first(tiny_components, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="midi, musicxml, lab, click, got 'pdf'"):
        Request(vocal="song.wav", export=("pdf",))
    parts = {name: folder for name, folder in tiny_components.items() if name != "score_reader"}
    accompanist = Accompanist.from_pretrained(assemble_bundle(tmp_path / "bundle", **parts))
    for asked in (
        Request(vocal=torch.rand(1, SAMPLE_RATE_HZ), export=("midi",)),
        Request(vocal=torch.rand(1, SAMPLE_RATE_HZ), play=INSTALLED),
    ):
        with pytest.raises(ConfigError, match="reads no score"):
            accompanist.compose(asked)
    with pytest.raises(DataError, match=r"missing\.sf3 does not exist"):
        Request(vocal="song.wav", play="missing.sf3")
    monkeypatch.setattr(requests, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"music21, which writes musicxml, .*\[score\]"):
        Request(vocal="song.wav", export=("lab", "musicxml"))
