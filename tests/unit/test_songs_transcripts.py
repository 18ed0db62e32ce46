"""Transcripts: what a file says is what is read, and a bad one is one clear line."""

import json
import math
from pathlib import Path

import pytest

from duotok.recipes.corpus.songs.segments import Sentence
from duotok.recipes.corpus.songs.transcripts import fit_sentences, read_transcript
from duotok.tokenizer.common.errors import DataError

LRC = """[ti:Song]
[offset:+500]
[00:01.50]<00:01.60>first <00:02.00>line
[00:04.00][00:09.00]twice
[00:06.00]
[00:12.00]last
"""
SRT = (
    "1\r\n00:00:01,000 --> 00:00:03,500\r\n<i>one</i>\r\ntwo\r\n\r\n"
    "2\r\n00:01:00,000 --> 00:01:02,000\r\nthree\r\n"
)
VTT = "WEBVTT\n\nid\n00:01.000 --> 00:03.500 align:start\none two\n\n01:00.000 --> 01:02.000\nthree\n"
WHISPERX = {
    "segments": [
        {"start": 1, "end": 3.5, "text": " one two", "words": []},
        {"start": 60, "end": 62, "text": "three"},
    ]
}
CUES = [Sentence(1.0, 3.5, "one two"), Sentence(60.0, 62.0, "three")]


def test_lrc_lines_end_where_the_next_begins(tmp_path: Path):
    path = tmp_path / "song.lrc"
    path.write_text(LRC, encoding="utf-8-sig")
    assert read_transcript(path) == [
        Sentence(1.0, 3.5, "first line"),
        Sentence(3.5, 5.5, "twice"),
        Sentence(8.5, 11.5, "twice"),
        Sentence(11.5, math.inf, "last"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.srt", SRT),
        ("a.vtt", VTT),
        ("a.json", json.dumps(WHISPERX)),
        ("b.json", json.dumps(WHISPERX["segments"])),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_the_same_sentences_from_every_format(tmp_path: Path, name: str, text: str, encoding: str):
    path = tmp_path / name
    path.write_text(text, encoding=encoding)
    assert read_transcript(path) == CUES


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.lrc", "[00:01.00]caf\xe9".encode("latin-1"), "neither UTF-8 nor UTF-16"),
        ("a.lrc", b"no times here", "no timed sentence"),
        ("a.json", b'{"title": "song"}', "not a json transcript"),
        ("a.json", b'{"segments": [{"start": "x", "end": 1, "text": "a"}]}', "not a json transcript"),
        ("a.json", b"{", "not a json transcript"),
        ("a.txt", b"words", "unknown kind"),
    ],
)
def test_a_bad_transcript_is_one_line(tmp_path: Path, name: str, data: bytes, reason: str):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError, match=reason) as caught:
        read_transcript(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_a_missing_transcript_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="none.lrc"):
        read_transcript(tmp_path / "none.lrc")


def test_sentences_are_fitted_to_the_recording():
    sentences = [
        Sentence(0, 4, "over"),
        Sentence(3, 5, "laps"),
        Sentence(8, math.inf, "open"),
        Sentence(12, 13, "past"),
    ]
    fitted, left_out = fit_sentences(sentences, 10.0)
    assert fitted == [Sentence(0, 3, "over"), Sentence(3, 5, "laps"), Sentence(8, 10.0, "open")]
    assert left_out == 1


def test_a_transcript_mostly_past_the_end_belongs_to_another_recording():
    with pytest.raises(DataError, match="2 of 3 sentences.*another recording"):
        fit_sentences([Sentence(1, 2, "a"), Sentence(11, 12, "b"), Sentence(20, 21, "c")], 10.0)
