"""Opens a folder or tar archive of scores as the source that it is, by what is inside."""

import re
import tarfile
import zlib
from pathlib import Path

from duotok.recipes.corpus.scores.musicxml import MusicXml
from duotok.recipes.corpus.scores.pop909 import Pop909
from duotok.recipes.corpus.scores.song import Songs
from duotok.tokenizer.common.errors import DataError

SCORE_FILE = re.compile(r"\.(mid|txt|mxl|musicxml|xml)$")
LONGEST_FILE_BYTES = 4_000_000
MOST_BYTES = 500_000_000  # of all files together


def open_songs(path: str | Path, cache: Path | None = None) -> Songs:
    """The songs of a folder or tar archive: POP909, or MusicXML (OpenEWLD, OpenScore Lieder).

    cache: a folder that keeps what was read of MusicXML, which takes a second a song; None keeps nothing.
    """
    path = Path(path)
    if path.is_dir():
        files = _read_folder(path)
    elif path.is_file():
        files = _read_archive(path)
    else:
        raise DataError(
            f"{path} does not exist; give the folder or tar.gz of POP909 "
            "(github.com/music-x-lab/POP909-Dataset), OpenEWLD or OpenScore Lieder"
        )
    for songs in (Pop909(path, files), MusicXml(path, files, cache)):
        if songs.names:
            return songs
    raise DataError(
        f"{path} holds no POP909 song (a folder such as 001 with 001.mid in it) "
        "and no MusicXML (.mxl, .musicxml)"
    )


def _read_folder(path: Path) -> dict[str, bytes]:
    found = [file for file in sorted(path.rglob("*")) if SCORE_FILE.search(file.name) and file.is_file()]
    return {
        file.relative_to(path.parent).as_posix(): file.read_bytes()
        for file in found
        if file.stat().st_size <= LONGEST_FILE_BYTES
    }


def _read_archive(path: Path) -> dict[str, bytes]:
    # Members are only read into memory: no path of theirs reaches the disk.
    files: dict[str, bytes] = {}
    total = 0
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                if (
                    not SCORE_FILE.search(member.name)
                    or not member.isfile()
                    or member.size > LONGEST_FILE_BYTES
                ):
                    continue
                total += member.size
                if total > MOST_BYTES:
                    raise DataError(f"{path} holds scores of more than {MOST_BYTES // 1_000_000} MB")
                opened = archive.extractfile(member)
                if opened is not None:
                    files.setdefault(member.name, opened.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable tar archive: {error}") from error
    return files
