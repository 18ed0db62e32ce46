"""Figures of whole songs on made-up ones whose answer is known."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation import score, table, whole_part
from duotok.recipes.evaluation.tempo_part import TEMPI_BPM, make_melody
from duotok.recipes.evaluation.whole_part import Hearing, Song, Window

NOTES = {"C": (0, 4, 7), "F": (5, 9, 0), "G": (7, 11, 2), "F#": (6, 10, 1), "C#": (1, 5, 8)}


@pytest.fixture
def item(tiny_corpus):
    return read_manifest(tiny_corpus / "test.jsonl")[0]


def chroma_of(chords, seconds=1.0):
    triads = np.zeros((len(chords), 12))
    for row, chord in zip(triads, chords, strict=True):
        row[list(NOTES[chord])] = 1.0
    return np.repeat(triads, round(seconds * 50), axis=0)


def test_a_passage_that_is_sung_twice_is_found():
    rng = np.random.default_rng(0)
    melody = rng.integers(60, 72, size=(160, 4))
    assert whole_part.find_repetition(melody) is None
    melody[90:130] = melody[10:50]
    melody[100, 1] += 1  # a slip
    melody[30:34] = melody[110:114] = -1  # a rest in both
    melody[4:10] = melody[84:90] = -1  # before it begins
    assert whole_part.find_repetition(melody) == (10, 90, 40)
    melody[90:107] = 0  # less than 8 bars are left
    melody[114:130, ::2] = 0
    assert whole_part.find_repetition(melody) is None


def test_what_repeats_at_once_does_not_run_into_itself():
    phrase = np.random.default_rng(1).integers(60, 72, size=(40, 4))
    found = whole_part.find_repetition(np.tile(phrase, (3, 1)))
    assert found is not None and found[1] - found[0] >= found[2] == 40


def test_the_melody_is_read_in_quarters_of_beats(item):
    notes = [(0.5, 0.8, 62, "la"), (1.0, 2.0, 64, "la")]
    song = replace(item, notes=notes, beats_seconds=[0.0, 0.5, 1.0, 1.5, 2.0, 2.5])
    rest = [-1] * 4
    expected = [rest, [62, 62, -1, -1], [64] * 4, [64] * 4, rest]
    assert whole_part.melody_of_beats(song).tolist() == expected


@pytest.mark.parametrize(
    "again, expected",
    [(["C", "F", "G", "C"], 1.0), (["F#", "C#", "F#", "F#"], -2 / 9), (["C", "F", "F#", "C#"], 1 / 3)],
)
def test_the_band_is_compared_beat_by_beat(again, expected):
    hearing = Hearing(chroma=chroma_of(["C", "F", "G", "C", *again, "C"]))
    found = hearing.compare(np.arange(9.0), 0, 4, 4)
    assert found == pytest.approx(expected)
    assert Hearing(chroma=np.zeros((400, 12))).compare(np.arange(9.0), 0, 4, 4) is None


def test_a_key_is_heard_where_something_sounds():
    chroma = chroma_of(["C", "F", "G", "C"] * 4)
    assert Hearing(chroma=chroma).key(0.0, 16.0) in ("C:maj", "A:min")
    assert Hearing(chroma=chroma, sounding=np.zeros(len(chroma), dtype=bool)).key(0.0, 16.0) is None


def test_windows_pauses_and_their_keys(item):
    notes = [(12.0, 13.0, 60, "la"), (20.0, 21.0, 60, "la"), (60.0, 61.0, 60, "la")]
    chords = [(0.0, 50.0, "C:maj"), (50.0, 105.0, "N")]
    keys = [(0.0, 40.0, "C:maj"), (40.0, 105.0, "D:maj")]
    song = replace(item, seconds=105.0, notes=notes, chords=chords, keys=keys)
    assert whole_part.cut_windows(song) == [(0.0, 30.0), (30.0, 60.0), (60.0, 90.0), (90.0, 105.0)]
    # After the last note there are no chords; 39 s of pause are cut into two.
    assert whole_part.find_pauses(song) == [(0.0, 12.0), (21.0, 40.5)]
    assert [whole_part.true_key(song, a, a + 30) for a in (0.0, 35.0, 200.0)] == ["C:maj", "D:maj", item.key]
    assert whole_part.true_key(item, 0.0, 30.0) == item.key


def test_beats_at_the_end():
    beats = np.arange(0.3, 60, 0.5)
    assert whole_part.steady_tempo(beats) == pytest.approx(120)
    assert whole_part.steady_tempo(np.where(beats < 30, beats, beats + 0.1)) is None
    assert whole_part.end_beat_error_ms(beats + 0.04, beats) == pytest.approx(40)
    assert whole_part.end_beat_error_ms(beats[::2], beats) == pytest.approx(250)  # half the beats are missing
    assert whole_part.end_beat_error_ms(np.zeros(0), beats) is None


@pytest.mark.parametrize(
    "found, expected", [(100.0, 1.0), (103.9, 1.0), (104.1, 0.0), (50.0, 0.0), (None, 0.0)]
)
def test_a_tempo_is_right_within_4_percent(found, expected):
    assert whole_part.is_near(found, 100.0) == expected


def test_made_up_melodies_keep_their_beat():
    melodies = [make_melody(tempo, 57) for tempo in TEMPI_BPM]
    for tempo, melody in zip(TEMPI_BPM, melodies, strict=True):
        eighths = (np.array([note.start for note in melody]) - 1) * tempo / 30
        assert np.abs(eighths - eighths.round()).max() < 1e-6 and eighths[0] == 0
        assert melody[-1].start < 1 + 64 * 60 / tempo and min(note.pitch for note in melody) >= 57
    assert len(melodies[TEMPI_BPM.index(70)]) == 12 * 8 + 4 * 2


def test_only_the_beginning_is_composed(tiny_bundle):
    lm = DualTrackLM.from_pretrained(tiny_bundle / "lm")
    source = torch.arange(30)
    beginner = whole_part.Beginner(lm, 10)
    codes = beginner.compose(source, seeds=[3, 4]).codes
    assert torch.equal(codes[:, :10], lm.compose(source[:10], seeds=[3, 4]).codes)
    assert codes.shape == (2, 30) and not codes[:, 10:].any()
    assert beginner.tokenizer_fingerprint == lm.tokenizer_fingerprint
    assert not whole_part.Beginner(lm, 0).compose(source, seeds=[1]).codes.any()


def make_song(**changes) -> Song:
    values = {field: None for field in Song.__dataclass_fields__} | {
        "windows": [],
        "pauses": [],
        "seconds": 130.0,
    }
    return Song(**{**values, **changes})


def test_figures_are_means_over_windows_and_songs():
    def window(sung, band, real):
        return Window(start=0, end=30, sung=sung, key="C:maj", heard={"": band, "_real": real, "plan": None})

    songs = [
        make_song(
            windows=[
                window(0.8, "A:min", "C:maj"),
                window(0.6, "G:maj", "C:maj"),
                window(0.3, "C:maj", None),
            ],
            bars_right=0.4,
            tempo_bpm=100.0,
            tempo_read_bpm=101.0,
            chorus_beats=(0, 40, 36),
        ),
        make_song(pauses=[window(0.0, None, "A:min")], bars_right=0.8, end_beat_error_given_ms=12.0),
    ]
    figures = whole_part.summarize(songs)
    assert figures["key_windows"] == pytest.approx(2 / 3) == figures["key_windows_real"]
    assert figures["key_windows_sung"] == 0.5 and figures["key_windows_sung_count"] == 2
    assert figures["key_windows_unsung"] == 0 and figures["key_windows_unsung_real"] == 1
    assert figures["plan_key_windows_sung"] == 0
    assert figures["bars_right"] == pytest.approx(0.6) and figures["tempo_right"] == 1
    assert figures["end_beat_error_given_ms"] == 12 and figures["end_beat_given_songs"] == 1
    assert figures["songs"] == 2 and figures["chorus_songs"] == 1 and "rtf" not in figures


def run(corpus, bundle, out, *options) -> int:
    return score.main(
        ["whole", "--corpus", str(corpus), "--bundle", str(bundle), "--out", str(out), *options]
    )


def test_excerpts_are_no_whole_songs(tiny_corpus, tiny_bundle, tmp_path, capsys):
    assert run(tiny_corpus, tiny_bundle, tmp_path / "results.json") == 1
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "no item of 120 s" in line and "--whole" in line


@pytest.mark.parametrize(
    "options, has_band, has_sound",
    [((), True, True), (("--plan-only",), False, False)],
)
def test_whole_songs_are_measured(
    tiny_corpus, tiny_bundle, tmp_path, monkeypatch, options, has_band, has_sound
):
    monkeypatch.setattr(whole_part, "SHORTEST_SECONDS", 5.0)
    monkeypatch.setattr(whole_part, "_SILENCE_SECONDS", 4.0)
    options = ("--items", "2", "--plots", str(tmp_path), *options)
    assert run(tiny_corpus, tiny_bundle, tmp_path / "results.json", *options) == 0
    figures = json.loads((tmp_path / "results.json").read_text())
    assert figures["whole.songs"] == 2 and figures["whole.song_seconds"] == 16
    assert 0 <= figures["whole.bars_right"] <= 1 and 0 <= figures["whole.plan_key_windows"] <= 1
    assert figures["whole.end_beat_error_given_ms"] < 500  # of beats half a second apart
    assert ("whole.key_windows" in figures) == has_band == ("whole.band_chords_majmin" in figures)
    assert ("whole.rtf" in figures) == has_sound
    # Songs of 8 s have no pause and no passage that comes again.
    shown = {key for rows in table.ROWS.values() for row in rows for key in row.keys if key[:6] == "whole."}
    missing = {key for key in shown if key not in figures and "unsung" not in key and "chorus" not in key}
    assert shown and (missing == set() or not has_sound)
    rows = json.loads((tmp_path / "whole" / "whole.json").read_text())
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["whole-test-0.png", "whole-test-1.png"]
    assert [row["id"] for row in rows] == ["test-0", "test-1"] and len(rows[0]["windows"]) == 1
