"""The command that makes a corpus from recordings: goes on, goes on with the rest, says what it left out."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.corpus.shards import read_shards
from duotok.recipes.corpus.songs import __main__ as songs
from duotok.recipes.corpus.worker_pool import run_all
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

ONE_SPLIT = ["--workers", "1", "--validation", "0", "--test", "0"]


class KillsItsReader:
    """A task whose arrival ends the process, as a crashing decoder does."""

    def __reduce__(self):
        return os._exit, (3,)


def test_a_task_that_kills_its_process_does_not_stop_the_rest():
    tasks = ["1", "x", KillsItsReader(), "4", "5", "6"]
    results = dict(zip(range(6), run_all(tasks, int, workers=2), strict=True))
    assert [results[k][0] for k in range(6)] == tasks
    assert [results[k][1] for k in (0, 3, 4, 5)] == [1, 4, 5, 6]
    assert "ValueError: invalid literal" in results[1][1] and "process died" in results[2][1]


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
    assert read_manifest(out / "train.jsonl") == items and [tar.name for tar in tars.iterdir()] == [
        "train-000000.tar"
    ]
    assert songs.main([*command, "--longest", "20"]) == 1
    assert "other settings (segments)" in capsys.readouterr().err


def test_shards_of_the_songs_join_without_work(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    base = ["--songs", str(folder), "--out", str(tmp_path), *ONE_SPLIT]
    codes = [songs.main([*base, "--shard", f"{number}/2"]) for number in (1, 2)]
    parts = [tmp_path / f"train.{number}-of-2.jsonl" for number in (1, 2)]
    ids = [item.id for path in parts if path.exists() for item in read_manifest(path)]
    assert 0 in codes and len(ids) == len(set(ids)) == 4
    assert songs.main(base) == 0
    assert sorted(item.id for item in read_manifest(tmp_path / "train.jsonl")) == sorted(ids)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--separator", "magic"], "unknown separator 'magic'"),
        (["--whisper", "no/such/model"], "model.bin is missing"),
        (["--songs", "no/such/folder"], "does not exist"),
        (["--shortest", "20"], "shortest_seconds"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, options: list[str], reason: str
):
    soundfile.write(tmp_path / "song.wav", np.zeros((10, 1)), SAMPLE_RATE_HZ)
    assert songs.main(["--songs", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and reason in lines[0]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b"])
def test_an_impossible_shard_is_a_usage_error(shard: str):
    with pytest.raises(SystemExit) as caught:
        songs.main(["--songs", "x", "--out", "y", "--shard", shard])
    assert caught.value.code == 2
