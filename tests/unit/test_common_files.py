"""Whole files and folders; and how a command ends: told to end, with an output that cannot be written."""

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError
from duotok.tokenizer.common.files import (
    WriteError,
    printable,
    read_json,
    whole_file,
    whole_folder,
    write_bytes,
    write_json,
    write_tensors,
    write_text,
)

WRITERS = {
    "json": lambda path: write_json(path, [1]),
    "text": lambda path: write_text(path, "é"),
    "bytes": lambda path: write_bytes(path, b"\xff"),
    "tensors": lambda path: write_tensors(path, {"a": torch.zeros(3)}, {"b": "c"}),
}


@pytest.mark.parametrize("kind", WRITERS)
def test_a_file_appears_whole_with_the_umask_s_rights(kind: str, tmp_path: Path):
    path = tmp_path / "new" / "file"
    before = os.umask(0o027)
    try:
        for _ in range(2):
            WRITERS[kind](path)
    finally:
        os.umask(before)
    assert [each.name for each in path.parent.iterdir()] == ["file"]
    assert path.stat().st_mode & 0o777 == 0o640
    (tmp_path / "taken").mkdir()
    for bad in (path / "below", tmp_path / "taken", tmp_path / ("x" * 500)):
        with pytest.raises(WriteError, match="cannot write") as error:
            WRITERS[kind](bad)
        assert "\n" not in str(error.value)


def test_what_stood_there_stays_after_an_error(tmp_path: Path):
    write_text(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as work:
        write_text(work / "old", "")
    with pytest.raises(RuntimeError), whole_file(tmp_path / "file") as work:
        work.write_text("half")
        raise RuntimeError
    with pytest.raises(WriteError, match="folder: File exists"), whole_folder(tmp_path / "folder") as work:
        write_text(work / "new", "half")
        (work / "new").mkdir()
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")) == [
        "file",
        "folder",
        "folder/old",
    ]
    assert (tmp_path / "file").read_text() == "old"
    with whole_folder(tmp_path / "folder") as work:
        write_text(work / "new", "")
    assert [path.name for path in (tmp_path / "folder").iterdir()] == ["new"]


@pytest.mark.parametrize("text", ["", "[" * 100_000, "\xff"])
def test_a_damaged_file_is_one_line(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_text(text, encoding="latin-1")
    with pytest.raises(DuoTokError, match="is not JSON"):
        read_json(tmp_path / "x.json")


def test_names_of_bytes_are_printable():
    assert printable(os.fsdecode(b"caf\xe9 \xc3\xa9.wav")) == "caf\\xe9 é.wav"


PROGRAM = """
import os, signal, sys
from pathlib import Path
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.files import whole_folder

def run():
    {0}

sys.exit(guard(run))
"""


def run_program(body: str, **options) -> subprocess.CompletedProcess[str]:
    options = {"stdout": subprocess.PIPE, **options}
    command = [sys.executable, "-c", PROGRAM.format(body)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=60, **options)


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129), (signal.SIGINT, 130)], ids=str
)
def test_a_command_that_is_told_to_end_cleans_up(tmp_path: Path, number: int, code: int):
    body = f"with whole_folder(Path({str(tmp_path / 'out')!r})):\n        os.kill(os.getpid(), {int(number)})"
    done = run_program(body + "\n        signal.pause()")
    assert (done.returncode, done.stderr) == (code, "interrupted: run the same command again to go on\n")
    assert list(tmp_path.iterdir()) == []


def test_handlers_are_only_lent():
    before = signal.getsignal(signal.SIGTERM)
    assert guard(lambda: None) == 0 and signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("body", ["print('made')", "print('made', flush=True)"])
def test_an_output_that_cannot_be_written_is_told(body: str):
    with open("/dev/full", "w") as full:
        done = run_program(body, stdout=full)
    assert done.returncode == 1 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "No space left on device" in done.stderr


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_goes_away_is_no_failure(unbuffered: str):
    reading, writing = os.pipe()
    os.close(reading)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = run_program("print('made')", stdout=writing, env=environment)
    os.close(writing)
    assert (done.returncode, done.stderr) == (0, "")


def test_names_that_are_no_utf_8_are_printed():
    done = run_program("print(os.fsdecode(b'caf\\xe9'))")
    assert (done.returncode, done.stdout, done.stderr) == (0, "caf\\udce9\n", "")


def test_what_the_system_says_is_one_line(tmp_path: Path):
    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10))

    done = run_program(f"Path({str(tmp_path / 'x')!r}).write_text('x' * 100)", preexec_fn=limit)
    assert (done.returncode, done.stderr) == (1, "error: File too large\n")
