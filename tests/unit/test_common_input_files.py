import os
import socket

import pytest

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import open_input, read_small_text, shown_name

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
