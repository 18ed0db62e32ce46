"""Files that somebody names: each thing that is no usable file is told from the others, in one line."""

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from .errors import DataError, DuoTokError

_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LONGEST_SHOWN = 100  # characters of a name in a message


def shown_name(path: str | Path) -> str:
    """Return a path as text for one line of a message or report: what cannot be printed is escaped.

    Bytes that are no UTF-8 become \\xe9 and the like; of a very long name the middle is left out.
    """
    text = os.fsencode(path).decode("utf-8", "backslashreplace")
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    half = _LONGEST_SHOWN // 2
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:half]}...{text[-half:]}"


def open_input(path: str | Path, *, wanted: str = "a file", error: type[DuoTokError] = DataError) -> BinaryIO:
    """Open a regular file for reading; never waits for a pipe and never reads from a device.

    wanted: what should be given instead. Raises `error` where the path is anything else, with the reason.
    """
    name = shown_name(path)
    try:
        # Looked at before it is opened: to open a pipe is to wait, and to open a device may act on it.
        _require_regular(os.stat(path).st_mode, name, wanted, error)
        file = open(path, "rb")
        try:
            _require_regular(os.fstat(file.fileno()).st_mode, name, wanted, error)
        except DuoTokError:
            file.close()
            raise
    except OSError as reason:
        raise error(_why_not(reason, name)) from reason
    except ValueError as reason:  # a null character, which no file system allows
        raise error(f"{name} is no name of a file; check the path") from reason
    return file


def read_small_text(path: str | Path, largest_bytes: int, *, wanted: str = "a text file") -> str:
    """Return the text of a file of at most largest_bytes in UTF-8, without a byte order mark.

    Line ends become "\\n". wanted: what should be given instead. Raises DataError for anything else.
    """
    name = shown_name(path)
    with open_input(path, wanted=wanted) as file:
        try:
            data = file.read(largest_bytes + 1)
        except OSError as reason:
            raise DataError(_why_not(reason, name)) from reason
    if len(data) > largest_bytes:
        raise DataError(f"{name} is too large, above {largest_bytes:,} bytes; give {wanted}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as reason:
        raise DataError(f"{name} is no text in UTF-8; give {wanted}") from reason
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _require_regular(mode: int, name: str, wanted: str, error: type[DuoTokError]) -> None:
    if stat.S_ISDIR(mode):
        raise error(f"{name} is a folder; give {wanted}")
    if not stat.S_ISREG(mode):
        raise error(f"{name} is {_KINDS.get(stat.S_IFMT(mode), 'no regular file')}; give {wanted}")


def _why_not(reason: OSError, name: str) -> str:
    if reason.errno == errno.ENOENT:
        return f"{name} does not exist; check the path"
    if reason.errno == errno.ENOTDIR:
        return f"{name} cannot exist, what should be its folder is a file; check the path"
    if reason.errno == errno.ENAMETOOLONG:
        return f"{name} cannot exist, the name is too long; check the path"
    if reason.errno in (errno.EACCES, errno.EPERM):
        return f"{name} may not be read; change its permissions (chmod +r) or those of its folders (chmod +x)"
    return f"{name} cannot be read: {reason.strerror or reason}; check the path"
