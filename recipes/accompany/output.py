"""The folder `generate` leaves: written aside, then put in place at once; nothing half-written stays."""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.errors import DuoTokError

if TYPE_CHECKING:
    from torch import Tensor

_RESULT_FILES = r"(accompaniment(-drums|-bass|-other)?|mix)(-\d+)?\.wav|separated-vocal\.wav|report\.json"


class OutputError(DuoTokError):
    """The output folder cannot be made or written."""


class OutputFolder:
    """A context that offers `work`, a folder to write into, and puts its files into `folder` on publish().

    Made before the long work begins, so that a folder that cannot be written is found out at once. Leaving
    without publish() leaves nothing behind. In an existing folder only files of the names in the regular
    expression `replaces`, left by earlier runs, are removed or replaced.
    """

    def __init__(self, folder: str | Path, replaces: str = _RESULT_FILES) -> None:
        self.folder = Path(folder)
        self._replaces = re.compile(replaces)
        self._made: list[Path] = []  # parents made for this output, outermost first
        self._published = False

    def __enter__(self) -> "OutputFolder":
        folder = self.folder
        try:
            if folder.exists() and not folder.is_dir():
                raise OutputError(f"{folder} is a file; give the name of a folder by --out")
            # Inside an existing folder, because its parent may be another disk or closed to us.
            place = folder if folder.is_dir() else folder.absolute().parent
            self._make_parents(place)
            self.work = Path(tempfile.mkdtemp(prefix=".duotok-", dir=place))
            # mkdtemp keeps others out; a published folder has the usual rights.
            umask = os.umask(0)
            os.umask(umask)
            self.work.chmod(0o777 & ~umask)
        except OSError as error:
            self._remove_parents()
            raise OutputError(
                f"cannot write into {folder}: {error.strerror or error}; choose another folder by --out"
            ) from error
        return self

    def publish(self) -> None:
        """Put the files of `work` into the folder; earlier results of ours there are replaced."""
        try:
            if not self.folder.is_dir():
                os.rename(self.work, self.folder)
            else:
                self._merge()
        except OSError as error:
            raise OutputError(f"cannot write into {self.folder}: {error.strerror or error}") from error
        self._published = True

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.work, ignore_errors=True)
        if not self._published:
            self._remove_parents()

    def _merge(self) -> None:
        new = sorted(path.name for path in self.work.iterdir())
        for name in new:
            os.replace(self.work / name, self.folder / name)
        for path in self.folder.iterdir():
            if self._replaces.fullmatch(path.name) and path.name not in new:
                path.unlink()

    def _make_parents(self, folder: Path) -> None:
        missing = []
        while not folder.exists():
            missing.append(folder)
            folder = folder.parent
        for parent in reversed(missing):
            parent.mkdir()
            self._made.append(parent)

    def _remove_parents(self) -> None:
        for parent in reversed(self._made):
            try:
                parent.rmdir()
            except OSError:
                return  # somebody else has put something there


def write_result(
    folder: Path, accompaniment: "Tensor", mix: "Tensor", report: dict[str, Any], *, suffix: str = ""
) -> None:
    """Write accompaniment<suffix>.wav, mix<suffix>.wav and (without a suffix) report.json."""
    from duotok.tokenizer.common.audio import write_audio

    write_audio(folder / f"accompaniment{suffix}.wav", accompaniment)
    write_audio(folder / f"mix{suffix}.wav", mix)
    if not suffix:
        write_report(folder, report)


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write report.json."""
    try:
        text = json.dumps(report, indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "report.json").write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot write {folder / 'report.json'}: {error.strerror or error}") from error
