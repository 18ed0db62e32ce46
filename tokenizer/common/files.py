"""Files: those that are written appear under their name only when they are whole; those that are given are
told apart from what is no usable file, in one line.

What is written stands under a temporary name until it is renamed, with the rights that the umask leaves.
"""

import errno
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from safetensors import SafetensorError

from .errors import CheckpointError, DataError, DuoTokError

if TYPE_CHECKING:
    from torch import Tensor

LARGEST_JSON_BYTES = 64_000_000  # a description is a few kB; the largest text model in one about 7 MB


class WriteError(DataError):
    """A file or folder cannot be written: on a full disk, without the right, below a file."""

    def __init__(self, path: Path, error: BaseException) -> None:
        self.reason = failure_reason(error)
        super().__init__(f"cannot write {path}: {self.reason}")


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """Offer an empty file that becomes `path` at the end of the block; WriteError, and the old one stays."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        if path.exists() and not path.is_file():
            raise OSError(errno.EEXIST, "there is something else than a file; give another name")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner reads
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise WriteError(path, error) from error
    finally:
        with suppress(OSError):  # where nothing could be written, nothing is to be removed
            temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: str | Path) -> Iterator[Path]:
    """Offer an empty folder to write into, which takes the place of `folder` at the end of the block.

    Raises WriteError where that fails; whatever stood at `folder` stays then, or, if the process
    is killed in the midst of the exchange, lies beside it as .NAME.PROCESS.old.
    """
    folder = Path(folder)
    temporary, old = (folder.with_name(f".{folder.name}.{os.getpid()}.{end}") for end in ("part", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError, WriteError) as error:
        raise WriteError(folder, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write bytes as a whole file; see whole_file."""
    with whole_file(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | Path, text: str) -> None:
    """Write text in UTF-8 as a whole file; see whole_file."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | Path, value: Any, *, indent: int = 1) -> None:
    """Write a JSON value as a whole file; see whole_file."""
    write_text(path, json.dumps(value, indent=indent) + "\n")


def write_tensors(
    path: str | Path, tensors: "Mapping[str, Tensor]", metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors, from any device, as a whole safetensors file; see whole_file."""
    from safetensors.torch import save_file

    stored = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with whole_file(path) as temporary:
        save_file(stored, temporary, metadata=None if metadata is None else dict(metadata))


def read_json(path: str | Path) -> Any:
    """Return what a JSON file of this program holds; raise DataError where it is missing or damaged."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}; delete it and run again") from error


def failure_reason(error: BaseException) -> str:
    """What the system said about a file that could not be written, in one line."""
    if isinstance(error, WriteError):
        return error.reason
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0]


def printable(text: object) -> str:
    r"""text with the bytes of file names that are no UTF-8 (surrogate escapes) written as \xe9."""
    return re.sub("[\udc80-\udcff]", lambda found: f"\\x{ord(found[0]) - 0xDC00:02x}", str(text))


def read_json_mapping(path: Path, what: str) -> dict[str, Any]:
    """Return the mapping in a JSON file; raises CheckpointError in one line where there is none.

    what: that the file belongs to. A file of other people is not trusted: its size and depth are bounded.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing or unreadable; give a complete {what}")
        if (size := path.stat().st_size) > LARGEST_JSON_BYTES:
            raise CheckpointError(
                f"{path} has {size / 1e6:.0f} MB, too many to be right; get the {what} again"
            )
        mapping = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing or unreadable; give a complete {what}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is damaged: it is no valid JSON; get the {what} again") from error
    if not isinstance(mapping, dict):
        raise CheckpointError(f"{path} is damaged: it holds no mapping; get the {what} again")
    return mapping


_KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}
_LONGEST_SHOWN = 100  # characters of a name in a message


def shown_name(path: str | Path) -> str:
    """Return a path for one line of a message: `printable`, controls escaped, cut in the middle."""
    text = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in printable(path))
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
    if reason.errno in (errno.EACCES, errno.EPERM):
        return f"{name} may not be read; change its permissions (chmod +r) or those of its folders (chmod +x)"
    known = {
        errno.ENOENT: "does not exist",
        errno.ENOTDIR: "cannot exist, what should be its folder is a file",
        errno.ENAMETOOLONG: "cannot exist, the name is too long",
    }
    told = known.get(reason.errno or 0, f"cannot be read: {reason.strerror or reason}")
    return f"{name} {told}; check the path"
