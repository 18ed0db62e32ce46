"""A person's recordings to tokens: what is left out and why, what is kept, how separated voices are gated."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.lm.dual_track.layout import TRACKS
from duotok.recipes.corpus.songs.recordings import find_songs
from duotok.recipes.finetuning.song_tokens import (
    Listened,
    SongListener,
    discard_unfinished,
    listen_to_songs,
    sung_gate,
)
from duotok.recipes.lm.tokens import TokenShards
from duotok.recipes.separation.stems import complete_stems
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer

RATE_HZ = 16_000
SECONDS = 6


class ShareSeparator:
    """A real if simple separator: a share of the mix is the voice."""

    name = "share"

    def __init__(self, share: float) -> None:
        self.share = share

    def separate(self, wave: torch.Tensor) -> dict[str, torch.Tensor]:
        return complete_stems(wave, {"vocal": self.share * wave})


@pytest.fixture(scope="module")
def band() -> np.ndarray:
    return 0.05 * np.random.default_rng(0).standard_normal((SECONDS * RATE_HZ, 1)).astype(np.float32)


@pytest.fixture(scope="module")
def voice(make_singing: Callable[..., np.ndarray]) -> np.ndarray:
    return make_singing(SECONDS, rate_hz=RATE_HZ)


@pytest.fixture(scope="module")
def tokenizer(tiny_components: dict[str, Path]) -> DuoTokenizer:
    return DuoTokenizer.from_pretrained(tiny_components["tokenizer"])


def write_pair(folder: Path, vocal: np.ndarray, accompaniment: np.ndarray) -> None:
    folder.mkdir(parents=True)
    soundfile.write(folder / "vocal.wav", vocal, RATE_HZ)
    soundfile.write(folder / "accompaniment.wav", accompaniment, RATE_HZ)


@pytest.fixture
def mix(tmp_path: Path, voice, band) -> Path:
    """A folder with one song that is to be separated."""
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "song.flac", voice + 0.1 * band, RATE_HZ)
    return tmp_path / "in"


def listen(folder: Path, work: Path, tokenizer: DuoTokenizer, separator=None, name: str = "") -> Listened:
    def open_separator():
        assert separator is not None, "nothing was to be separated"
        return separator

    listener = SongListener(tokenizer, open_separator, torch.device("cpu"))
    return listen_to_songs(find_songs(folder), work, listener, separator_name=name)


def test_a_pair_becomes_its_tokens(tmp_path: Path, tokenizer: DuoTokenizer, voice, band):
    write_pair(tmp_path / "in" / "song", voice, band)
    heard = listen(tmp_path / "in", tmp_path / "work", tokenizer)
    (part,) = heard.parts
    assert part.song == "song" and part.frames == 25 * SECONDS and heard.left_out == []
    codes = TokenShards(heard.tokens).codes(part)
    for track in TRACKS:
        wave = read_audio(tmp_path / "in" / "song" / f"{track}.wav", channels=1)
        agrees = (codes[track] == tokenizer.encode(wave[None], track)[0]).float().mean()
        assert agrees > 0.9 and len(codes[track].unique()) > 1  # stems pass through 16 bits once more
    assert list((tmp_path / "work" / ".work").iterdir()) == []


def test_bad_songs_are_left_out_with_their_reasons(
    tmp_path: Path, tokenizer: DuoTokenizer, voice, band, capsys: pytest.CaptureFixture
):
    songs = tmp_path / "in"
    write_pair(songs / "a good", voice, band)
    write_pair(songs / "b short", voice[: 2 * RATE_HZ], band[: 2 * RATE_HZ])
    write_pair(songs / "c instrumental", 1e-4 * band, band)
    write_pair(songs / "d alone", voice, 1e-5 * band)
    write_pair(songs / "e damaged", voice, band)
    (songs / "e damaged" / "vocal.wav").write_bytes(b"no sound")
    write_pair(songs / "f unequal", voice, band[: 3 * RATE_HZ])
    write_pair(songs / "g silent", 0 * voice, 0 * band)
    heard = listen(songs, tmp_path / "work", tokenizer)
    assert [part.song for part in heard.parts] == ["a good"]
    told = {record.song[0]: record.reason for record in heard.left_out}
    expected = {"b": "lasts 2.0 s", "c": "singing is heard in 0 %", "d": "no accompaniment"}
    expected |= {"e": "not readable", "f": "do not have one length", "g": "is silent"}
    assert told.keys() == expected.keys()
    assert all(text in told[key] for key, text in expected.items()), told
    lines = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert len(lines) == len(expected)


def test_songs_are_heard_once_until_they_change(
    tmp_path: Path, tokenizer: DuoTokenizer, voice, band, monkeypatch: pytest.MonkeyPatch
):
    songs, work = tmp_path / "in", tmp_path / "work"
    for name in ("a", "b"):
        write_pair(songs / name, voice, band)
    first = listen(songs, work, tokenizer)
    heard: list[str] = []
    real = SongListener.listen
    monkeypatch.setattr(
        SongListener, "listen", lambda self, song, folder: heard.append(song.name) or real(self, song, folder)
    )
    assert listen(songs, work, tokenizer) == first and heard == []
    for name in ("vocal", "accompaniment"):
        wave, _ = soundfile.read(songs / "b" / f"{name}.wav")
        soundfile.write(songs / "b" / f"{name}.wav", wave[: 5 * RATE_HZ + 100], RATE_HZ)
    again = listen(songs, work, tokenizer)
    assert heard == ["b"] and [part.song for part in again.parts] == ["a", "b"]
    assert [part.frames for part in again.parts] == [25 * SECONDS, 126]
    before, after = TokenShards(first.tokens), TokenShards(again.tokens)
    assert torch.equal(before.codes(first.parts[0])["vocal"], after.codes(again.parts[0])["vocal"])
    (songs / "a" / "vocal.wav").unlink()
    (songs / "a" / "accompaniment.wav").unlink()
    assert [part.song for part in listen(songs, work, tokenizer).parts] == ["b"]
    with pytest.raises(ConfigError, match="separator"):
        listen(songs, work, tokenizer, name="another one")


def test_a_mix_is_separated_and_long_songs_come_in_parts(
    mix: Path, tmp_path: Path, tokenizer: DuoTokenizer, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duotok.recipes.finetuning.song_tokens.PART_SECONDS", 2.5)
    heard = listen(mix, tmp_path / "work", tokenizer, ShareSeparator(1 / 3))
    assert [part.frames for part in heard.parts] == [50, 50, 50]
    assert len({part.id for part in heard.parts}) == 3 and {part.song for part in heard.parts} == {"song"}


def test_the_leak_of_a_band_is_no_voice(mix: Path, tmp_path: Path, tokenizer: DuoTokenizer):
    """What a separator takes out of an instrumental is harmonic too, but faint beside the band."""
    heard = listen(mix, tmp_path / "work", tokenizer, ShareSeparator(10 ** (-15 / 20)))
    assert heard.parts == [] and "nobody seems to sing in it" in heard.left_out[0].reason
    assert "15 dB below" in heard.left_out[0].reason


def test_what_a_killed_run_left_is_no_song(tmp_path: Path, voice, band):
    write_pair(tmp_path / "mine.work" / ".work" / "key", voice, band)
    assert len(find_songs(tmp_path)) == 1
    discard_unfinished(tmp_path / "mine.work")
    with pytest.raises(DataError, match="no recordings"):
        find_songs(tmp_path)


def test_the_gate_opens_around_the_singing():
    gate = sung_gate([(2.0, 3.0), (3.5, 4.0), (8.0, 9.0)], 1.0, 9 * SAMPLE_RATE_HZ)
    expected = {1.2: 0.0, 2.5: 1.0, 3.3: 1.0, 4.4: 1.0, 6.0: 0.0, 9.9: 0.0}
    assert {s: float(gate[round((s - 1) * SAMPLE_RATE_HZ)]) for s in expected} == expected
    assert float(gate.diff().abs().max()) < 1e-3  # no clicks
