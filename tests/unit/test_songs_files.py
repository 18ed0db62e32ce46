"""Finding songs, their stems and transcripts, and reading them: recordings in blocks, sentences in time."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.corpus.songs.recordings import find_songs
from duotok.recipes.corpus.songs.segments import Sentence
from duotok.recipes.corpus.songs.transcripts import fit_sentences, read_transcript
from duotok.tokenizer.common.audio import read_audio, stream_audio
from duotok.tokenizer.common.errors import DataError


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_stems_and_transcripts_next_to_a_song_are_its_own(tmp_path: Path):
    for name in "plain.mp3 plain.lrc plain.wav album/live.flac album/live.flac.srt notes.txt".split():
        touch(tmp_path / name)
    for name in ("vocals", "drums", "bass", "other"):
        touch(tmp_path / "album/live" / f"{name}.wav")
        touch(tmp_path / "multi" / f"{name}.wav")
    for name in ("mixture.wav", "lyrics.json"):
        touch(tmp_path / "multi" / name)
    for name in ("vocal.ogg", "accompaniment.ogg"):
        touch(tmp_path / "pair" / name)
    songs = {song.name: song for song in find_songs(tmp_path)}
    assert list(songs) == ["album/live", "multi", "pair", "plain"]
    assert songs["plain"].mix == tmp_path / "plain.mp3" and songs["plain"].stems == {}
    assert songs["plain"].transcript == tmp_path / "plain.lrc"
    assert set(songs["album/live"].stems) == {"vocal", "drums", "bass", "other"}
    assert songs["album/live"].transcript == tmp_path / "album/live.flac.srt"
    assert songs["multi"].mix == tmp_path / "multi/mixture.wav"
    assert songs["multi"].transcript == tmp_path / "multi/lyrics.json"
    assert songs["pair"].mix is None and set(songs["pair"].stems) == {"vocal", "other"}


def test_a_list_names_songs_relative_to_itself(tmp_path: Path):
    touch(tmp_path / "in" / "a.wav")
    (tmp_path / "list.txt").write_text("# songs\nin/a.wav\n\nin/gone.wav\n", encoding="utf-8")
    songs = find_songs(tmp_path / "list.txt")
    assert [song.name for song in songs] == ["in/a", "in/gone"]
    # The same song has the same key and the same random numbers when its folder is given instead.
    (again,) = find_songs(tmp_path / "in")
    assert again.name == "a" and find_songs(tmp_path)[0].key == songs[0].key


def test_a_folder_without_recordings_is_one_line(tmp_path: Path):
    with pytest.raises(DataError, match="no recordings"):
        find_songs(tmp_path)
    with pytest.raises(DataError, match="does not exist"):
        find_songs(tmp_path / "none")
    (tmp_path / "list.txt").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(DataError, match="UTF-8"):
        find_songs(tmp_path / "list.txt")


@pytest.mark.parametrize(("rate_hz", "channels"), [(48_000, 2), (44_100, 1), (11_025, 2), (32_000, 6)])
def test_blocks_joined_are_the_whole_recording(
    tmp_path: Path, make_singing: Callable[..., np.ndarray], rate_hz: int, channels: int
):
    path = tmp_path / "song.wav"
    soundfile.write(path, make_singing(11.3, rate_hz=rate_hz, channels=channels), rate_hz, subtype="FLOAT")
    blocks = list(stream_audio(path, 100_000))
    assert {block.shape[1] for block in blocks[:-1]} == {100_000} and blocks[-1].shape[1] <= 100_000
    joined, whole = torch.cat(blocks, dim=1), read_audio(path)
    assert torch.equal(joined, whole)


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
LINES = [{"start": 1, "end": 3.5, "text": " one two", "words": []}, {"start": 60, "end": 62, "text": "three"}]
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
        ("a.json", json.dumps({"segments": LINES})),
        ("b.json", json.dumps(LINES)),
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
    with pytest.raises(DataError, match="none.lrc"):
        read_transcript(tmp_path / "none.lrc")


def test_sentences_are_fitted_to_the_recording():
    sentences = [Sentence(0, 4, "over"), Sentence(3, 5, "laps")]
    sentences += [Sentence(8, math.inf, "open"), Sentence(12, 13, "past")]
    fitted, left_out = fit_sentences(sentences, 10.0)
    assert fitted == [Sentence(0, 3, "over"), Sentence(3, 5, "laps"), Sentence(8, 10.0, "open")]
    assert left_out == 1
    with pytest.raises(DataError, match="2 of 3 sentences.*another recording"):
        fit_sentences([Sentence(1, 2, "a"), Sentence(11, 12, "b"), Sentence(20, 21, "c")], 10.0)
