"""Files and folders that appear under their name only when they are whole.

They are written under a temporary name beside it, which goes when the writing fails or is interrupted, and
then renamed. Their rights are those that the umask leaves.
"""

import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from .errors import CheckpointError, DataError

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
    """Offer an empty file to write into, which takes the place of `path` at the end of the block.

    Raises WriteError where that fails; whatever stood at `path` stays then.
    """
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
    """Return what a JSON file holds; raise DataError where it is missing or damaged."""
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
