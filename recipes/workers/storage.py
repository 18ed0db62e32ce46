"""Files anywhere: on this machine, or at the URLs that fsspec knows, which are waited for and kept here.

A storage that drops connections, answers slowly or is too busy (503) is asked again, later and later, and
said in one line; what is fetched is kept in a folder of bounded size, in which a file is whole or not there.
"""

import os
import random
import re
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from duotok.tokenizer.common.errors import ConfigError, DataError, DuoTokError
from duotok.tokenizer.common.files import WriteError, whole_file

BLOCK_BYTES = 16_000_000  # that are asked for at a time, so that what breaks off is not begun anew
SILENCE_SECONDS = 60.0  # after which a server is taken to have died
PATIENCE_SECONDS = 600.0  # for one block; processes that train together wait as long for each other
FIRST_PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 1.0, 60.0
# What the packages of storages raise that is no OSError.
_ERRORS = {
    "aiohttp": "ClientError",
    "botocore.exceptions": "BotoCoreError",
    "gcsfs.retry": "HttpError",
    "google.auth.exceptions": "GoogleAuthError",
    "azure.core.exceptions": "AzureError",
}
_PASSING = (408, 425, 429)  # of the statuses 400 to 499
_DENIED = re.compile(r"credential|forbidden|denied|unauthori[sz]ed", re.IGNORECASE)

ResultT = TypeVar("ResultT")


def is_remote(place: str) -> bool:
    """Tell whether a path or URL lies elsewhere than in this machine's folders."""
    return "://" in place and not place.startswith("file://")


def open_storage(place: str) -> tuple[Any, str]:
    """Return fsspec's file system of a path or URL, and the path in it; ConfigError where it has none."""
    import fsspec

    options: dict[str, Any] = {}
    try:
        if re.match(r"https?://", place):
            import aiohttp

            silence = aiohttp.ClientTimeout(
                total=None, sock_connect=SILENCE_SECONDS, sock_read=SILENCE_SECONDS
            )
            options = {"client_kwargs": {"timeout": silence}}
        return fsspec.core.url_to_fs(place, **options)
    except ModuleNotFoundError as error:
        raise ConfigError(f"{place:.200} needs {error.name}: pip install {error.name}") from error
    except (ImportError, ValueError, *_storage_errors()) as error:
        raise ConfigError(f"{place:.200} cannot be reached: {_one_line(error)}") from error


def ask(place: str, call: Callable[[], ResultT]) -> ResultT:
    """Return what a storage answers; DataError in one line where it is not there, not for us, or says no."""
    try:
        return call()
    except _storage_errors() as error:
        raise _refusal(place, error) from error


def _storage_errors() -> tuple[type[BaseException], ...]:
    loaded = [(sys.modules[module], name) for module, name in _ERRORS.items() if module in sys.modules]
    return OSError, EOFError, *(getattr(module, name) for module, name in loaded)


def _one_line(error: BaseException) -> str:
    told = " ".join(str(error).split()) or "no answer"
    return f"{type(error).__name__}: {told:.200}"


def _status(error: BaseException) -> int:
    found = getattr(error, "status", None) or getattr(error, "code", None)
    return found if isinstance(found, int) else 0


def _is_final(error: BaseException) -> bool:
    """Whether asking again is of no use."""
    status = _status(error)
    return (
        isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))
        or 400 <= status < 500
        and status not in _PASSING
        or _DENIED.search(_one_line(error)) is not None
    )


def _refusal(place: str, error: BaseException) -> DataError:
    if isinstance(error, FileNotFoundError) or _status(error) == 404:
        return DataError(f"{place:.200} is not there; check the address")
    denied = isinstance(error, PermissionError) or _status(error) in (401, 403)
    if denied or _DENIED.search(_one_line(error)):
        return DataError(f"{place:.200} may not be used: {_one_line(error)}; give its credentials and rights")
    return DataError(f"{place:.200} cannot be read or written: {_one_line(error)}")


class _Patience:
    """Asks a storage for parts of one file until it answers."""

    def __init__(self, place: str) -> None:
        self._place, self._is_told = place, False

    def ask(self, call: Callable[[], ResultT]) -> ResultT:
        """Return what the storage answers; DataError where it refuses, or is silent for too long."""
        began, pause = time.monotonic(), FIRST_PAUSE_SECONDS
        while True:
            try:
                return call()
            except _storage_errors() as error:
                is_over = time.monotonic() - began > PATIENCE_SECONDS
                if _is_final(error) or is_over:
                    raise _refusal(self._place, error) from error
                if not self._is_told:
                    told = f"{self._place:.200}: {_one_line(error)}; waiting, and asking again"
                    print(told, file=sys.stderr, flush=True)
                    self._is_told = True
            time.sleep(pause * random.uniform(0.5, 1.0))  # many processes do not ask all at once
            pause = min(2 * pause, LONGEST_PAUSE_SECONDS)


@dataclass(frozen=True)
class FileCache:
    """A folder of files from elsewhere that holds no more than so many bytes; the oldest used go first.

    Any number of processes may use it at once; a file that several want is fetched by one of them.
    """

    folder: Path
    most_bytes: int

    def open(self, url: str) -> BinaryIO:
        """Open a file for reading, fetched first where it is not here."""
        path = self._path(url)
        while True:  # another process may drop it between the fetch and here
            with suppress(FileNotFoundError, NotADirectoryError):
                os.utime(path)
                return path.open("rb")
            self.fetch(url)

    def drop(self, url: str) -> None:
        """Remove a file that has turned out to be damaged."""
        self._path(url).unlink(missing_ok=True)

    def fetch(self, url: str) -> None:
        """Bring a file here; DataError where it cannot be had or has no room."""
        from filelock import FileLock

        path = self._path(url)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise WriteError(self.folder, error) from error
        with FileLock(self._lock(path.name)):
            if path.exists():  # another process was faster
                return
            for left in self.folder.glob(f".{path.name}.*.part"):  # by a process that was killed
                left.unlink()
            patience = _Patience(url)
            storage, place = open_storage(url)
            size = patience.ask(lambda: storage.size(place))
            if not size:
                raise DataError(f"{url:.200} has no size that its server tells; put it on another one")
            with whole_file(path) as temporary:
                self._make_room(url, size, temporary)
                with temporary.open("r+b") as file:
                    while (at := file.tell()) < size:
                        file.write(patience.ask(lambda at=at: _read_block(storage, place, at, size)))
                    file.flush()
                    os.fsync(file.fileno())  # a power cut must not leave the name without the content

    def _path(self, url: str) -> Path:
        name = re.sub(r"[^\w.-]", "_", url.rpartition("/")[2])[-60:]
        return self.folder / f"{sha256(url.encode()).hexdigest()[:16]}-{name}"

    def _lock(self, name: str) -> str:
        return str(self.folder / f"{name}.lock")

    def _make_room(self, url: str, size: int, temporary: Path) -> None:
        """Give a temporary file its size, which counts from now on, and drop others for it."""
        from filelock import FileLock

        if size > self.most_bytes:
            raise DataError(
                f"{url:.200} has {size / 1e9:.3g} GB, more than the cache of {self.most_bytes / 1e9:.3g} GB "
                f"in {self.folder}; raise data.cache_gb"
            )
        while True:
            with FileLock(self._lock("room")):
                files = []
                for path in self.folder.iterdir():
                    with suppress(FileNotFoundError):
                        if path.suffix != ".lock":
                            files.append((path.stat().st_mtime, path.stat().st_size, path))
                total = sum(held for _, held, _ in files)
                for _, held, path in sorted(files):
                    if total + size > self.most_bytes and self._remove(path):
                        total -= held
                if total + size <= self.most_bytes:
                    os.truncate(temporary, size)
                    return
            time.sleep(FIRST_PAUSE_SECONDS)  # the rest is what others are fetching

    def _remove(self, path: Path) -> bool:
        """Remove a file, unless it is one that some process is fetching."""
        from filelock import FileLock, Timeout

        name = path.name.removeprefix(".").rsplit(".", 2)[0] if path.suffix == ".part" else path.name
        try:
            with FileLock(self._lock(name), timeout=0):
                path.unlink(missing_ok=True)
                return True
        except Timeout:
            return False


def _read_block(storage: Any, place: str, start: int, size: int) -> bytes:
    stop = min(size, start + BLOCK_BYTES)
    data = storage.cat_file(place, start=start, end=stop)
    if len(data) == size:  # a server that knows no ranges
        return data[start:]
    if len(data) != stop - start:
        raise EOFError(f"{len(data)} bytes came of {stop - start}")
    return data


def fetch_quietly(cache: FileCache, url: str) -> None:
    """Fetch a file ahead of its use, which is what tells of a failure."""
    with suppress(DuoTokError):
        cache.fetch(url)
