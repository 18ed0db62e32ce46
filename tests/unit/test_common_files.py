"""Whole files and folders; what is no usable file; how a command ends when it is told to, or cannot write."""

import os
import resource
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import (
    WriteError,
    open_input,
    printable,
    read_json,
    read_small_text,
    shown_name,
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
    # A signal that the tests' own parent ignores, as nohup does, is not ignored here.
    heard = {"preexec_fn": lambda: signal.signal(number, signal.SIG_DFL)}
    done = run_program(body + "\n        signal.pause()", **heard)
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


_ACCENT = os.fsdecode(b"caf\xe9.txt")  # no UTF-8


def test_a_small_text_is_read(tmp_path):
    path = tmp_path / _ACCENT
    path.write_bytes(b"\xef\xbb\xbf0 1 C:maj\r\n1 2 N\r")
    assert read_small_text(path, 100) == "0 1 C:maj\n1 2 N\n"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("none", "none does not exist"),
        ("folder", "folder is a folder; give a text file"),
        ("pipe", "pipe is a named pipe; give"),
        ("socket", "socket is a socket; give"),
        ("/dev/zero", "/dev/zero is a device; give"),
        ("x" * 500, r"x\.\.\.x+ cannot exist, the name is too long"),
        ("large/below", "its folder is a file"),
        ("null\0", r"null\\x00 is no name of a file"),
        ("loop", "cannot be read"),
        ("large", "too large, above 9 bytes"),
        ("bytes", "no text in UTF-8"),
        ("line\nbreak", r"line\\nbreak does not exist"),
        (_ACCENT, r"caf\\xe9.txt does not exist"),
    ],
)
def test_each_wrong_thing_has_its_line(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "large").write_bytes(bytes(10))
    (tmp_path / "bytes").write_bytes(b"\xff")
    (tmp_path / "loop").symlink_to("loop")
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")
    with pytest.raises(DataError, match=message) as error:
        read_small_text(name, 9)
    assert str(error.value).isprintable() and len(str(error.value)) < 250


@pytest.mark.skipif(os.name == "nt", reason="permissions of POSIX")
def test_a_file_that_may_not_be_read(tmp_path):
    path = tmp_path / "secret"
    path.write_text("")
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(65_534)  # root may read everything
    try:
        with pytest.raises(DataError, match="may not be read"):
            open_input(path)
    finally:
        os.seteuid(user)


def test_a_usual_name_is_shown_as_it_is():
    assert shown_name("songs/Für Elise 愛.wav") == "songs/Für Elise 愛.wav"
