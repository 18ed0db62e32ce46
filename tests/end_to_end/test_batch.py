"""Many songs in one go: lists, bad rows, what is there already, storage that is no folder."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duotok.recipes import batch
from duotok.recipes.evaluation import load
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

fsspec = pytest.importorskip("fsspec")
SECONDS = 2.0


@pytest.fixture(scope="module")
def vocals(tmp_path_factory: pytest.TempPathFactory, make_singing: Callable[..., np.ndarray]) -> Path:
    folder = tmp_path_factory.mktemp("vocals")
    for name in ("a", "b"):
        soundfile.write(folder / f"{name}.wav", make_singing(SECONDS), SAMPLE_RATE_HZ)
    (folder / "notes.txt").write_text("no song")
    return folder


def run(songs: object, out: object, bundle: Path) -> int:
    return batch.main(["--songs", str(songs), "--out", str(out), "--model", str(bundle)])


def test_a_list_is_made_once_and_bad_songs_do_not_stop_it(
    vocals: Path, tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"id": "first", "vocal": "a.wav", "seed": 3, "format": "flac"},
        {"vocal": str(vocals / "b.wav"), "candidates": 2},
        {"id": "text", "vocal": "notes.txt"},
        {"id": "gone", "vocal": "gone.wav"},
        {"id": "bad", "vocal": "a.wav", "format": "midi"},
    ]
    songs = vocals / "songs.jsonl"
    songs.write_text("\n".join(map(json.dumps, rows)) + "\n")
    assert run(songs, tmp_path, tiny_bundle) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 2 of 5 songs") and "3 were left out" in last
    reasons = {row["id"]: row["reason"] for row in map(json.loads, (tmp_path / "left_out.jsonl").open())}
    assert set(reasons) == {"text", "gone", "bad"} and "gone.wav" in reasons["gone"]
    assert {path.name for path in tmp_path.iterdir()} == {"first", "b", "left_out.jsonl"}
    assert soundfile.info(tmp_path / "first/mix.flac").frames == SECONDS * SAMPLE_RATE_HZ
    report = json.loads((tmp_path / "b/report.json").read_text())
    made = (tmp_path / "first/report.json").stat().st_mtime_ns
    assert report["seconds"] == SECONDS
    songs.write_text("\n".join(map(json.dumps, rows[:2])) + "\n")
    assert run(songs, tmp_path, tiny_bundle) == 0
    assert (tmp_path / "first/report.json").stat().st_mtime_ns == made
    assert not (tmp_path / "left_out.jsonl").exists()


def test_a_folder_into_storage_that_is_no_folder(
    vocals: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = fsspec.filesystem("memory")
    monkeypatch.setattr(batch, "_accompanist", None)
    rows = batch.read_rows(str(vocals))
    assert [row.id for row in rows] == ["a", "b"]
    batch.start_worker(tiny_bundle, "cpu", None)
    batch.make_song((rows[0], "memory://results"))
    names = {Path(path).name for path in files.find("/results/a")}
    assert names == {"accompaniment.wav", "codes.safetensors", "mix.wav", "report.json"}


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (["{"], "line 1 is no JSON"),
        (["[]"], "line 1 must be an object"),
        (['{"vocal": "a.wav", "speed": 2}'], "line 1 has no field 'speed'"),
        (['{"vocal": 3}'], "vocal must name a file, got 3"),
        (['{"vocal": "a.wav"}', "", '{"id": "a", "vocal": "b.wav"}'], "two songs called 'a'"),
        (['{"vocal": "a.wav", "id": "../a"}'], "cannot name a folder"),
        ([], "has no recordings"),
    ],
)
def test_bad_lists_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: list[str], reason: str
) -> None:
    songs = tmp_path / "songs.jsonl"
    songs.write_text("\n".join(lines))
    assert run(songs, tmp_path / "out", tmp_path) == 1
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_the_memory_of_its_processes_is_measured(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    held = load._memory_of(os.getpid())
    code = "import time; kept = b'x' * 200_000_000; print(flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        grown = load._memory_of(os.getpid()) - held
        child.kill()
    assert 200e6 <= grown <= 300e6
    assert load._memory_of(child.pid) == 0
    assert load.main(["--batch", "--jobs", "2", "--bundle", str(tmp_path)]) == 1
    assert capfd.readouterr().err.splitlines()[-1] == "error: batch ended with 1, after 0 looks at its memory"
