"""Finding songs, their stems and transcripts, and reading any recording in blocks."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.corpus.songs.recordings import find_songs
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
