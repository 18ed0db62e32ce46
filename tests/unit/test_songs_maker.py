"""One recording to its items, with records that are kept; the command goes on and says what it left out."""

import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.corpus.shards import read_shards
from duotok.recipes.corpus.songs import __main__ as songs
from duotok.recipes.corpus.songs.maker import (
    SongMaker,
    SongRecord,
    SongsConfig,
    check_settings,
    read_record,
    read_records,
    split_of,
    write_manifests,
    write_record,
)
from duotok.recipes.corpus.songs.recordings import SongFile, find_songs, make_stems
from duotok.recipes.separation.stems import complete_stems
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError
from duotok.tokenizer.heads import STEMS

SECONDS = 24
SUNG = (8, 16)  # seconds between which somebody sings


class HalfSeparator:
    """A real if simple separator: a third of the mix is the voice, a sixth the drums; the rest is other."""

    name = "third"

    def __init__(self) -> None:
        self.longest = 0

    def separate(self, wave: torch.Tensor) -> dict[str, torch.Tensor]:
        self.longest = max(self.longest, wave.shape[1])
        return complete_stems(wave, {"vocal": wave / 3, "drums": wave / 6})


@pytest.fixture(scope="module")
def song_folder(tmp_path_factory: pytest.TempPathFactory, make_singing: Callable[..., np.ndarray]) -> Path:
    """A folder with one song: its stems (voice from 8 to 16 s over a quiet bleed) and a transcript."""
    folder = tmp_path_factory.mktemp("songs")
    (folder / "song").mkdir()
    rng = np.random.default_rng(0)
    shape = (SECONDS * SAMPLE_RATE_HZ, 2)
    vocal = 0.0005 * rng.normal(size=shape)
    vocal[SUNG[0] * SAMPLE_RATE_HZ : SUNG[1] * SAMPLE_RATE_HZ] += make_singing(SUNG[1] - SUNG[0], channels=2)
    stems = {"vocals": vocal, "drums": 0.1 * rng.normal(size=shape), "other": 0.05 * rng.normal(size=shape)}
    for name, wave in stems.items():
        soundfile.write(folder / "song" / f"{name}.wav", wave, SAMPLE_RATE_HZ)
    lines = "[00:08.00]first line\n[00:12.00]second line\n[00:16.00]"
    (folder / "song" / "lyrics.lrc").write_text(lines, encoding="utf-8")
    return folder


def make_one(source: Path, out: Path, **settings: object) -> list[Item]:
    (song,) = find_songs(source)
    return SongMaker(SongsConfig(**settings), out).make(song).items  # type: ignore[arg-type]


def test_the_four_kinds_of_sample_come_out(song_folder: Path, tmp_path: Path):
    items = make_one(song_folder, tmp_path)
    assert [bool(item.lyrics) for item in items] == [False, True, False]
    before, sung, after = items
    assert sung.text_between(0.0, sung.seconds) == "first line second line"
    assert sung.sung_between(0.0, sung.seconds) == pytest.approx(8.0, abs=0.3)
    assert sung.tempo_bpm is None and sung.key is None and sung.split == after.split
    assert 5.0 <= before.seconds <= 8.0 and before.text_between(0.0, 30.0) == ""
    for item in items:
        waves = torch.stack([item.read(stem) for stem in STEMS])
        assert waves.shape[-1] == round(item.seconds * SAMPLE_RATE_HZ)
        assert torch.allclose(waves.sum(dim=0), item.read("mix"), atol=6 / 32_768)
        assert bool(waves[0].abs().max() > 0) == bool(item.lyrics)
        assert not waves[2].any()  # the song has no bass
    assert not (tmp_path / ".work" / find_songs(song_folder)[0].key).exists()


def test_a_separator_is_asked_in_blocks_and_its_stems_sum_to_the_mix(
    tmp_path: Path, make_singing: Callable[..., np.ndarray], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("duotok.recipes.corpus.songs.recordings.BLOCK_SECONDS", 4)
    path = tmp_path / "song.wav"
    soundfile.write(path, make_singing(13.7, rate_hz=11_025), 11_025)
    separator = HalfSeparator()
    stems = make_stems(find_songs(tmp_path)[0], tmp_path, lambda: separator)
    assert separator.longest <= 6 * SAMPLE_RATE_HZ
    assert stems.seconds == pytest.approx(13.7, abs=1e-3)
    waves = stems.read(0.0, stems.seconds)
    # Cross-fading blocks of a linear separator gives back what one block would have given.
    for part, share in ((0, 1 / 3), (1, 1 / 6), (2, 0), (3, 1 / 2)):
        assert torch.allclose(waves[part], waves[4] * share, atol=4 / 32_768)
    assert torch.allclose(waves[4, :, 100:-100], read_audio(path)[:, 100 : waves.shape[-1] - 100], atol=1e-3)
    middle = stems.read(5.0, 6.0)
    assert torch.equal(middle, waves[..., 5 * SAMPLE_RATE_HZ : 6 * SAMPLE_RATE_HZ])


def test_loud_stems_are_scaled_together(song_folder: Path, tmp_path: Path):
    loud = tmp_path / "in" / "song"
    loud.mkdir(parents=True)
    for name in ("vocals", "other"):
        wave, _ = soundfile.read(song_folder / "song" / f"{name}.wav")
        soundfile.write(loud / f"{name}.wav", wave * (0.99 / np.abs(wave).max()), SAMPLE_RATE_HZ)
    for item in make_one(tmp_path / "in", tmp_path / "out"):
        waves = torch.stack([item.read(stem) for stem in STEMS])
        assert item.read("mix").abs().max() <= 0.985
        assert torch.allclose(waves.sum(dim=0), item.read("mix"), atol=6 / 32_768)


@pytest.mark.parametrize(
    ("samples", "level", "reason"),
    [(SAMPLE_RATE_HZ, 0.1, "lasts 1.0 s"), (10 * SAMPLE_RATE_HZ, 0.0, "is silent")],
)
def test_short_and_silent_songs_say_why(tmp_path: Path, samples: int, level: float, reason: str):
    folder = tmp_path / "in" / "song"
    folder.mkdir(parents=True)
    for name in ("vocals", "other"):
        soundfile.write(folder / f"{name}.wav", np.full((samples, 2), level), SAMPLE_RATE_HZ)
    with pytest.raises((DataError, AudioError), match=reason):
        make_one(tmp_path / "in", tmp_path / "out")


def test_stems_of_another_length_are_refused(song_folder: Path, tmp_path: Path):
    (song,) = find_songs(song_folder)
    short = tmp_path / "short.wav"
    soundfile.write(short, np.full((SAMPLE_RATE_HZ, 2), 0.1), SAMPLE_RATE_HZ)
    with pytest.raises(AudioError, match="do not have one length"):
        make_stems(replace(song, stems={**song.stems, "bass": short}), tmp_path, HalfSeparator)


@pytest.mark.parametrize(
    ("lines", "reason", "has_words"),
    [
        (b"[00:08.00]caf\xe9", "neither UTF-8", False),
        (b"[00:08.00]one\n[00:12.00]two\n[00:16.00]\n[01:00.00]past", "1 sentences lie past the end", True),
        (b"[01:00.00]past", "another recording", False),
        (b"[00:01.00]no\n[00:03.00]\n[00:18.00]one\n[00:20.00]", "no voice is heard in 2 of its 2", False),
    ],
)
def test_a_bad_transcript_is_noted_and_the_song_goes_on(
    song_folder: Path, tmp_path: Path, lines: bytes, reason: str, has_words: bool
):
    (tmp_path / "bad.lrc").write_bytes(lines)
    (song,) = find_songs(song_folder)
    record = SongMaker(SongsConfig(), tmp_path / "out").make(replace(song, transcript=tmp_path / "bad.lrc"))
    assert len(record.notes) == 1 and reason in record.notes[0][1] and "\n" not in record.notes[0][1]
    sung = [item for item in record.items if item.lyrics]
    assert sung and any(item.text_between(0, 30) != "" for item in sung) == has_words


def test_records_are_kept_until_the_files_change(song_folder: Path, tmp_path: Path):
    (song,) = find_songs(song_folder)
    record = SongMaker(SongsConfig(), tmp_path).make(song)
    assert read_record(tmp_path, song) is None
    write_record(tmp_path, song, record)
    assert read_record(tmp_path, song) == record
    silent = SongRecord(song="b", signature={}, reason="is silent")
    write_manifests(tmp_path, [*read_records(tmp_path), silent])
    (manifest,) = [path for path in tmp_path.glob("*.jsonl") if path.name != "left_out.jsonl"]
    assert read_manifest(manifest) == record.items
    assert (tmp_path / "left_out.jsonl").read_text() == '{"song": "b", "reason": "is silent"}\n'
    write_record(tmp_path, song, replace(record, is_final=False))
    assert read_record(tmp_path, song) is None
    write_record(tmp_path, song, record)
    changed = replace(song, transcript=None)
    assert read_record(tmp_path, changed) is None and not record.items[0].path("mix").exists()
    (tmp_path / "songs" / f"{song.key}.json").write_text("{")
    assert read_record(tmp_path, song) is None and read_records(tmp_path) == []


def test_another_setting_needs_another_folder(tmp_path: Path):
    for known in ({"more": "of an older version"}, {}):
        check_settings(tmp_path / "out", asdict(SongsConfig()) | known)
    with pytest.raises(ConfigError, match="separator"):
        check_settings(tmp_path / "out", asdict(SongsConfig(separator="demucs")))
    with pytest.raises(ConfigError, match="shares"):
        SongsConfig(validation_share=0.9, test_share=0.2)


def test_splits_go_by_the_song_alone():
    known = [SongFile(name=f"album/{k}", mix=None, stems={}, transcript=None) for k in range(2_000)]
    splits = [split_of(song, 0.1, 0.05) for song in known]
    assert splits == [split_of(song, 0.1, 0.05) for song in known]
    assert splits.count("test") == pytest.approx(100, abs=35)
    assert splits.count("validation") == pytest.approx(200, abs=50)


ONE_SPLIT = ["--workers", "1", "--validation", "0", "--test", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, make_singing: Callable[..., np.ndarray]) -> Path:
    """Two songs with stems (one with words), and files that are no songs."""
    root = tmp_path_factory.mktemp("in")
    rng = np.random.default_rng(0)
    for name in ("one", "two"):
        (root / name).mkdir()
        vocal = np.zeros((12 * SAMPLE_RATE_HZ, 2), np.float32)
        vocal[: 6 * SAMPLE_RATE_HZ] = make_singing(6.0, channels=2)
        soundfile.write(root / name / "vocals.flac", vocal, SAMPLE_RATE_HZ)
        soundfile.write(root / name / "other.flac", 0.1 * rng.normal(size=vocal.shape), SAMPLE_RATE_HZ)
    (root / "one" / "lyrics.srt").write_text("1\n00:00:00,000 --> 00:00:06,000\nla la\n", encoding="utf-8")
    (root / "two" / "lyrics.srt").write_bytes(b"\xff")
    (root / "junk").mkdir()
    for name in ("vocals.wav", "other.wav"):
        (root / "junk" / name).write_bytes(b"no sound")
    return root


def test_a_folder_becomes_a_corpus_and_running_again_changes_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    out, tars = tmp_path / "out", tmp_path / "tars"
    command = ["--songs", str(folder), "--out", str(out), *ONE_SPLIT, "--shards", str(tars)]
    assert songs.main(command) == 0
    closing = capsys.readouterr().out.splitlines()[-1]
    assert "2 songs, 4 cuts" in closing and "2 sung (1 with words), 2 instrumental" in closing
    assert "2 left out, see left_out.jsonl" in closing and "vocals.wav is not readable" in closing
    items = read_manifest(out / "train.jsonl")
    assert [item.song for item in items] == ["one", "one", "two", "two"]
    left_out = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    assert [line["song"] for line in left_out] == ["junk", "two"]
    assert [item.id for item in read_shards(tars / "train-000000.tar")] == [item.id for item in items]

    made = {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.flac"))}
    (out / "train.jsonl").unlink()
    assert songs.main(command) == 0
    assert {path: path.stat().st_mtime_ns for path in sorted(out.rglob("*.flac"))} == made
    assert read_manifest(out / "train.jsonl") == items
    assert [tar.name for tar in tars.iterdir()] == ["train-000000.tar"]
    assert songs.main([*command, "--longest", "20"]) == 1
    assert "other settings (segments)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--separator", "magic"], "unknown separator 'magic'"),
        (["--whisper", "no/such/model"], "model.bin is missing"),
        (["--songs", "no/such/folder"], "does not exist"),
        (["--shortest", "20"], "shortest_seconds"),
        (["--workers", "0"], "--workers must be at least 1"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], reason: str
):
    soundfile.write(tmp_path / "song.wav", np.zeros((10, 1)), SAMPLE_RATE_HZ)
    assert songs.main(["--songs", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and reason in lines[0]
