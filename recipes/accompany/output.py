"""The files that a command leaves: written aside, then put in place at once; nothing of others is touched.

report.json is the mark of a result: it says which command made it and lists its files. A later run of that
command replaces these files and no others.
"""

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import failure_reason, printable, read_json, write_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


REPORT = "report.json"
# Name -> ending, coding, bytes that a sample of both sides takes at most. 24 bits lose nothing that is heard.
FORMATS = {
    "wav": (".wav", "PCM_16", 4.0),
    "wav24": (".wav", "PCM_24", 6.0),
    "float": (".wav", "FLOAT", 8.0),
    "flac": (".flac", "PCM_24", 6.1),
    "mp3": (".mp3", "MPEG_LAYER_III", 1.0),
}
_STEMS, _PLAYED = ("drums", "bass", "other"), ("drums", "bass", "keys")
_WORK_NAME = re.compile(r"\.duotok-[0-9a-f]{12}")
_HEADER_BYTES, _REPORT_BYTES = 100, 20_000
_CODES_BYTES = 2_000  # and 18 for each of 25 frames a second


class Export(NamedTuple):
    """A file of `--export`."""

    stem: str
    suffix: str
    packages: tuple[str, ...] = ()  # that write it
    is_of_each: bool = False  # whether each accompaniment has its own


EXPORTED = {
    "midi": Export("song", ".mid", ("mido",), is_of_each=True),
    "musicxml": Export("lead-sheet", ".musicxml", ("music21",)),
    "lab": Export("chords", ".lab"),
    "click": Export("click", ".wav"),
}
_EXPORT_BYTES = 1_000_000  # of one that is no sound


class OutputError(DuoTokError):
    """The output folder cannot be made or written, or something of somebody else is in the way."""


class OutputFolder:
    """A context that offers `work`, a folder to write into, and puts its files into `folder` on publish().

    Made before the long work begins, so that what is in the way, a full disk, a folder that cannot be written
    and another run into it are found out at once. Leaving without publish() leaves nothing behind.
    """

    def __init__(
        self,
        folder: str | Path,
        expected: Mapping[str, int],
        *,
        command: str = "generate",
        inputs: Iterable[str | Path] = (),
    ) -> None:
        """expected: name -> bytes of the files to be written; inputs: files that must stay as they are."""
        self.folder = Path(folder)
        self._expected = {**expected, REPORT: _REPORT_BYTES}
        self._command = command
        self._inputs = [Path(path) for path in inputs]
        self._made: list[Path] = []  # parents made for this output, outermost first
        self._published = False

    def __enter__(self) -> "OutputFolder":
        folder = self.folder
        try:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file; give the name of a folder by --out")
            self._is_new = not folder.is_dir()
            self._require_room(self._expected)
            # Inside an existing folder, because its parent may be another disk or closed to us.
            place = folder.absolute().parent if self._is_new else folder
            self._make_parents(place)
            if self._is_new:
                with suppress(FileNotFoundError):  # as it should be: nothing has that name
                    folder.lstat()
                    raise OutputError(f"{folder} is a link to nothing; choose another folder by --out")
            _remove_left_over(place)
            self.work = place / f".duotok-{hashlib.sha256(os.fsencode(folder.name)).hexdigest()[:12]}"
            self._lock = _take(self.work, folder)
            try:
                free = shutil.disk_usage(self.work).free
                needed = sum(self._expected.values())
                if free < needed:
                    raise OutputError(
                        f"the result needs {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free on the disk "
                        f"of {folder}; make room, or choose another folder by --out"
                    )
            except BaseException:
                self._leave()
                raise
        except OSError as error:
            self._remove_parents()
            raise OutputError(
                f"cannot write into {folder}: {failure_reason(error)}; choose another folder by --out"
            ) from error
        except OutputError:
            self._remove_parents()
            raise
        return self

    def publish(self) -> None:
        """Put the files of `work` into the folder; the earlier result there, if any, is replaced."""
        try:
            if self.folder.is_dir():
                self._merge()
            else:
                os.rename(self.work, self.folder)
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {failure_reason(error)}") from error
        self._published = True

    def __exit__(self, *_: object) -> None:
        self._leave()
        if not self._published:
            self._remove_parents()

    def _leave(self) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if self._lock is not None:
            os.close(self._lock)

    def _require_room(self, names: Iterable[str]) -> set[str]:
        """Return the files of an earlier result; OutputError if a new one would replace anything else."""
        earlier = _listed_files(self.folder, self._command)
        for name in sorted({*names, *earlier}):
            path = self.folder / name
            for given in self._inputs:
                if path.exists() and given.exists() and path.samefile(given):
                    raise OutputError(f"{given} is an input and would be replaced; choose another by --out")
            if os.path.lexists(path) and (name not in earlier or path.is_dir()):
                raise OutputError(
                    f"{path} is in the way and of no earlier result of {self._command}; move it, or choose "
                    "another folder by --out"
                )
        return earlier

    def _merge(self) -> None:
        new = sorted((path.name for path in self.work.iterdir()), key=lambda name: (name != REPORT, name))
        if self._is_new and any(self.folder.iterdir()):
            raise OutputError(f"{self.folder} was made by somebody else meanwhile; choose another by --out")
        earlier = self._require_room(new)
        for name in new:  # the report first: what it lists is known as ours whatever comes
            os.replace(self.work / name, self.folder / name)
        for name in earlier.difference(new):
            (self.folder / name).unlink(missing_ok=True)

    def _make_parents(self, folder: Path) -> None:
        for parent in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
            parent.mkdir(exist_ok=True)
            self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:
                return  # somebody else has put something there


def _listed_files(folder: Path, command: str) -> set[str]:
    """The files that the report.json in the folder, if it is one of the command, lists as its own."""
    path = folder / REPORT
    try:
        report = read_json(path) if path.is_file() else None
    except DataError:
        return set()  # not ours
    if not isinstance(report, dict) or report.get("made_by") != f"duotok {command}":
        return set()
    names = report.get("files")
    return {name for name in names if Path(str(name)).name == name} if isinstance(names, list) else set()


def _take(work: Path, folder: Path) -> int | None:
    """Make the folder `work` and lock it for this process; return the lock, None where the system has none.

    What another process has left there is removed, when it lives no more. OutputError if it does.
    """
    for _ in range(20):
        try:
            work.mkdir()
            is_mine = True
        except FileExistsError:
            is_mine = False
        try:
            lock = _try_lock(work)
        except BlockingIOError:
            time.sleep(0.01)  # it may be just looked at, to find what is left over
            continue
        except FileNotFoundError:
            continue
        if lock is not None:
            for path in work.iterdir():
                path.unlink() if path.is_symlink() or not path.is_dir() else shutil.rmtree(path)
            return lock
        if is_mine:
            return None
        break
    raise OutputError(
        f"another run is writing into {folder}; wait for its end, or choose another folder by --out "
        f"(if there is none, delete {work})"
    )


def _try_lock(work: Path) -> int | None:
    """A lock on a folder, None where there are none; BlockingIOError where another process holds it."""
    if fcntl is None:
        return None
    lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if work.stat().st_ino == os.fstat(lock).st_ino:
            return lock
        raise FileNotFoundError(f"{work} has been renamed")
    except (BlockingIOError, FileNotFoundError):
        os.close(lock)
        raise
    except OSError:  # a file system without locks
        os.close(lock)
        return None


def _remove_left_over(place: Path) -> None:
    """Remove the work folders that killed runs have left beside ours."""
    with suppress(OSError):  # a folder that cannot be listed, or what another run removes as well
        for path in [path for path in place.iterdir() if _WORK_NAME.fullmatch(path.name)]:
            with suppress(BlockingIOError):  # its run goes on
                lock = _try_lock(path)
                if lock is not None:
                    shutil.rmtree(path, ignore_errors=True)
                    os.close(lock)


def exported_name(kind: str, suffix: str = "") -> str:
    """Name of an exported file, of the accompaniment with that suffix."""
    each = EXPORTED[kind]
    return f"{each.stem}{suffix if each.is_of_each else ''}{each.suffix}"


def expected_files(
    samples: int,
    *,
    renderings: int = 1,
    stems: bool = False,
    separated: bool = False,
    format: str = "wav",
    exports: Iterable[str] = (),
    played: bool = False,
) -> dict[str, int]:
    """Name -> bytes of what `generate` writes for a vocal of so many samples, without report.json."""
    ending, _, width = FORMATS[format]
    plain, exact = (_HEADER_BYTES + round(size * samples) for size in (width, 8))
    suffixes = [""] if renderings == 1 else [f"-{number}" for number in range(1, renderings + 1)]
    files = {f"{kind}{end}{ending}": plain for kind in ("accompaniment", "mix") for end in ["", *suffixes]}
    if stems:
        files |= {f"accompaniment-{stem}{suffix}.wav": exact for stem in _STEMS for suffix in suffixes}
    if played:
        files |= {f"played-{part}{suffix}.wav": exact for part in _PLAYED for suffix in suffixes}
        files |= {f"played{suffix}{ending}": plain for suffix in suffixes}
    if separated:
        files[f"separated-vocal{ending}"] = plain
    files |= {f"codes{end}.safetensors": _CODES_BYTES + samples // 80 for end in ["", *suffixes]}
    for kind in exports:
        size = _HEADER_BYTES + 2 * samples if kind == "click" else _EXPORT_BYTES
        files |= {exported_name(kind, suffix): size for suffix in suffixes}
    return files


def write_report(folder: Path, report: Mapping[str, Any], *, command: str = "generate") -> None:
    """Write report.json, which lists the files of the folder; the last file to be written."""
    files = sorted({REPORT, *(path.name for path in folder.iterdir())})
    marked = {**report, "made_by": f"duotok {command}", "files": files}
    text = json.dumps(marked, indent=2, ensure_ascii=False, allow_nan=False)
    # Bytes of file names that are no UTF-8.
    text = re.sub("[\udc80-\udcff]", lambda found: json.dumps(printable(found[0]))[1:-1], text)
    write_text(folder / REPORT, text + "\n")
