"""The queue of songs: what has been accepted is in a database on disk and is made once, whatever happens.

queue = SongQueue(Path("duotok-songs"), bound=100)
song_id = queue.submit({"seed": 7}, Path("song.wav"))
queue.look(song_id).state

DIR/songs.sqlite says what is known of each song; DIR/songs/ID/given holds its recordings under names of ours
(and a folder `original`, where a stretch of that is made anew), DIR/songs/ID/result what was made, which is a
folder `work` until all of it is there; DIR/songs/ID/live.wav grows while a song is made that somebody hears.
"""

import json
import os
import secrets
import shutil
import sqlite3
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from duotok.recipes.accompany.output import REPORT
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import failure_reason, read_json

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

STATES = ("queued", "running", "done", "failed", "cancelled")
ENDED = ("done", "failed", "cancelled")
MOST_ATTEMPTS = 5  # a song in which the process has died as often is not tried again
ORIGINAL = "original"  # stored name of the folder with the song whose stretch is made anew
_USUAL_SECONDS = 30.0  # that a song takes before one has been made here
_SCHEMA = """
CREATE TABLE IF NOT EXISTS songs (
    number INTEGER PRIMARY KEY AUTOINCREMENT,  -- the order in which they are made
    id TEXT NOT NULL UNIQUE,
    state TEXT NOT NULL DEFAULT 'queued',
    stage TEXT,
    fraction REAL NOT NULL DEFAULT 0,
    ranking TEXT,
    report TEXT,
    error TEXT,
    settings TEXT NOT NULL,
    names TEXT NOT NULL,
    worker TEXT,
    attempts INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL,
    started REAL,
    ended REAL
);
CREATE INDEX IF NOT EXISTS by_state ON songs (state, number);
"""
_VERSION = 1

Recording = Path | BinaryIO


class QueueFullError(DuoTokError):
    """As many songs wait as may; `retry_seconds` is when to ask again."""

    def __init__(self, waiting: int, retry_seconds: int) -> None:
        self.retry_seconds = retry_seconds
        super().__init__(f"{waiting} songs are waiting already; try again in {retry_seconds} s")


class UnknownSongError(DuoTokError):
    """There is no song of that id, or not any more."""

    def __init__(self) -> None:
        super().__init__("there is no such song; it may have been deleted")


@dataclass(frozen=True, kw_only=True)
class Song:
    """What is known of a song at one moment; times are in seconds since 1970."""

    id: str
    state: str  # one of STATES
    stage: str | None  # the last one of the pipeline's STAGES that was told of
    fraction: float  # of all its work, 0 to 1
    ranking: Sequence[Mapping[str, Any]]  # candidates as their codes fit, best first, once they are composed
    report: Mapping[str, Any] | None  # report.json, when it is done
    error: str | None  # one line, when it failed
    created: float
    ended: float | None
    ahead: int  # songs that are made before this one
    files: Sequence[str]  # what can be fetched, when it is done
    settings: Mapping[str, Any]  # fields of Request that are no files
    names: Mapping[str, str]  # vocal-1, vocal-2.., mix-1, prefix-1 -> what the recording is called


class SongQueue:
    """Songs to be made, being made and made; may be used by many threads of one process."""

    def __init__(self, folder: Path, *, bound: int) -> None:
        """folder: is made where it is missing; bound: how many songs may wait.

        Raises DataError where the folder cannot be used or another process works in it.
        """
        self.folder, self.bound = Path(folder), bound
        self._songs, self.incoming = self.folder / "songs", self.folder / "incoming"
        try:
            for part in (self._songs, self.incoming):
                part.mkdir(parents=True, exist_ok=True)
            self.folder.chmod(0o700)  # what people sing is nobody else's business
            self._lock_file = open(self.folder / "lock", "ab")
            self._take_folder()
            self._database = sqlite3.connect(
                self.folder / "songs.sqlite", isolation_level=None, check_same_thread=False
            )
            self._database.row_factory = sqlite3.Row
            self._database.execute("PRAGMA journal_mode = WAL")
            self._database.execute("PRAGMA synchronous = FULL")  # accepted is accepted when the power fails
            version = self._database.execute("PRAGMA user_version").fetchone()[0]
            if version not in (0, _VERSION):
                raise DataError(f"{folder} is of another version of duotok; give another folder by --data")
            self._database.executescript(f"{_SCHEMA}PRAGMA user_version = {_VERSION};")
        except OSError as error:
            raise DataError(
                f"cannot write into {folder}: {failure_reason(error)}; give another folder by --data"
            ) from error
        except sqlite3.Error as error:
            raise DataError(
                f"{folder}/songs.sqlite cannot be used: {error}; give another by --data"
            ) from error
        self._heard = set[str]()  # ids of songs that somebody listens to
        self._lock = threading.RLock()
        self._arrived = threading.Condition(self._lock)

    def _take_folder(self) -> None:
        if fcntl is None:
            return
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(
                f"another process serves the songs of {self.folder}; end it or give another folder by --data"
            ) from error

    def close(self) -> None:
        """Let go of the folder."""
        with self._lock:
            self._database.close()
            self._lock_file.close()

    # What clients do

    def submit(
        self,
        settings: Mapping[str, Any],
        recording: Recording | Sequence[Recording],
        *,
        is_mix: bool = False,
        prefix: Recording | None = None,
        original: Sequence[Path] = (),
        names: Sequence[str] = (),
    ) -> str:
        """Accept a song and return its id, which cannot be guessed; when this returns, it will be made.

        settings: fields of Request that are no files, ready for JSON, `chords` as the text of a chart.
        recording: of the singer, one take or several, or the whole song where is_mix; it is copied.
        original: files of a result, a stretch of which is wanted anew; they are kept even if that is deleted.
        names: what the recordings are called, for messages. Raises QueueFullError and DataError.
        """
        self.require_room()
        takes = list(recording) if isinstance(recording, (list, tuple)) else [recording]
        stored = ["mix-1"] if is_mix else [f"vocal-{number}" for number in range(1, len(takes) + 1)]
        shown = dict(zip(stored, [*names, *stored[len(names) :]], strict=False))
        sources: dict[str, Any] = dict(zip(stored, takes, strict=True))
        if prefix is not None:
            sources["prefix-1"], shown["prefix-1"] = prefix, "the prefix"
        song_id = secrets.token_urlsafe(18)
        while song_id.startswith(("-", "_")):  # such as command lines and people take for something else
            song_id = secrets.token_urlsafe(18)
        given = self._songs / song_id / "given"
        try:
            given.mkdir(parents=True)
            for name, source in sources.items():
                _copy(source, given / name)
            if original:
                (given / ORIGINAL).mkdir()
                for path in original:
                    _link(path, given / ORIGINAL / path.name)
                _settle(given / ORIGINAL)
            _settle(given, given.parent, self._songs)
            with self._lock:
                with self._database:
                    self._database.execute("BEGIN IMMEDIATE")
                    self.require_room()
                    self._database.execute(
                        "INSERT INTO songs (id, settings, names, created) VALUES (?, ?, ?, ?)",
                        (song_id, json.dumps(dict(settings)), json.dumps(shown), time.time()),
                    )
                self._arrived.notify()
        except (OSError, sqlite3.Error) as error:
            shutil.rmtree(given.parent, ignore_errors=True)
            reason = failure_reason(error)
            raise DataError(f"the song cannot be kept here ({reason}); try again later") from error
        except BaseException:
            shutil.rmtree(given.parent, ignore_errors=True)
            raise
        return song_id

    def require_room(self) -> None:
        """Raise QueueFullError where no further song may wait."""
        waiting = self.count("queued")
        if waiting >= self.bound:
            raise QueueFullError(waiting, self._guess_seconds())

    def look(self, song_id: str) -> Song:
        """Return what is known of a song; raises UnknownSongError."""
        with self._lock:
            row = self._row("SELECT * FROM songs WHERE id = ?", song_id)
            if row is None:
                raise UnknownSongError
            ahead = 0
            if row["state"] == "queued":
                query = "SELECT count(*) FROM songs WHERE state = 'queued' AND number < ?"
                ahead = self._database.execute(query, (row["number"],)).fetchone()[0]
        report = row["report"] and json.loads(row["report"])
        return Song(
            ranking=json.loads(row["ranking"] or "[]"),
            report=report,
            files=tuple(report["files"]) if report else (),
            settings=json.loads(row["settings"]),
            names=json.loads(row["names"]),
            ahead=ahead,
            **{name: row[name] for name in ("id", "state", "stage", "fraction", "error", "created", "ended")},
        )

    def open_file(self, song_id: str, name: str) -> Path:
        """Return the path of a file that was made, one that the report lists; raises UnknownSongError."""
        if name not in self.look(song_id).files:
            raise UnknownSongError
        return self._songs / song_id / "result" / name

    def listen(self, song_id: str) -> Song:
        """Let a song be heard while it is made, in its `live_file`, and look at it; or UnknownSongError."""
        song = self.look(song_id)
        if song.state not in ENDED:
            self._heard.add(song_id)
        return song

    def live_file(self, song_id: str) -> Path:
        """Return where the mix of a song grows while it is made."""
        return self._songs / song_id / "live.wav"

    def cancel(self, song_id: str) -> None:
        """Let a song that is not made yet stay unmade; one being made stops at its next progress."""
        with self._lock:
            self._database.execute(
                "UPDATE songs SET state = 'cancelled', ended = ? WHERE id = ? "
                "AND state IN ('queued', 'running')",
                (time.time(), self.look(song_id).id),
            )

    def delete(self, song_id: str) -> None:
        """Cancel a song and remove all that is known of it."""
        with self._lock:
            found = self._database.execute("DELETE FROM songs WHERE id = ?", (song_id,)).rowcount
        if not found:
            raise UnknownSongError
        self._heard.discard(song_id)
        shutil.rmtree(self._songs / song_id, ignore_errors=True)

    # What workers do

    def claim(self, worker: str, wait_seconds: float = 0.0) -> Song | None:
        """Take the song that has waited longest, or None where none comes within wait_seconds."""
        with self._lock:
            query = (
                "UPDATE songs SET state = 'running', worker = ?, attempts = attempts + 1, started = ?, "
                "fraction = 0, ranking = NULL WHERE number = "
                "(SELECT min(number) FROM songs WHERE state = 'queued') RETURNING id"
            )
            row = self._row(query, worker, time.time())
            if row is None and wait_seconds > 0 and self._arrived.wait(wait_seconds):
                row = self._row(query, worker, time.time())
            return None if row is None else self.look(row["id"])

    def is_heard(self, song_id: str) -> bool:
        """Whether somebody has begun to listen to a song."""
        return song_id in self._heard

    def given(self, song: Song) -> dict[str, Path]:
        """Return the recordings of a song, and the folder of its original: stored name -> path."""
        given = self._songs / song.id / "given"
        names = [*song.names, *([ORIGINAL] if (given / ORIGINAL).is_dir() else [])]
        return {name: given / name for name in names}

    def work_folder(self, song_id: str) -> Path:
        """Return an empty folder in which a song is made; DataError where the song was deleted meanwhile."""
        work = self._songs / song_id / "work"
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir()
        except OSError as error:
            raise DataError(f"the song cannot be kept here ({failure_reason(error)})") from error
        return work

    def progress(
        self,
        song_id: str,
        worker: str,
        stage: str,
        fraction: float,
        ranking: Sequence[Mapping[str, Any]] | None = None,
    ) -> bool:
        """Note how far a worker is with a song; whether it is still to be made."""
        told = None if ranking is None else json.dumps(list(ranking))
        return self._change(
            song_id,
            worker,
            "stage = ?, fraction = ?, ranking = coalesce(?, ranking)",
            stage,
            fraction,
            told,
        )

    def finish(self, song_id: str, worker: str, report: Mapping[str, Any]) -> bool:
        """Show what lies in the work folder, all of it at once; False where the song is not wanted any more.

        report: report.json, which lists the files.
        """
        work, result = (self._songs / song_id / name for name in ("work", "result"))
        try:
            _settle(*work.iterdir(), work)
            os.rename(work, result)  # from here on the song is made, even if this process ends now
            _settle(result.parent)
        except OSError as error:
            raise DataError(f"the song cannot be kept here ({failure_reason(error)})") from error
        is_wanted = self._change(
            song_id,
            worker,
            "state = 'done', fraction = 1, report = ?, ended = ?",
            json.dumps(report),
            time.time(),
        )
        self._heard.discard(song_id)
        if is_wanted:
            self.live_file(song_id).unlink(missing_ok=True)  # who hears it has it open
        else:
            self.drop(song_id)
        return is_wanted

    def fail(self, song_id: str, worker: str, error: str) -> None:
        """Note in one line why a song cannot be made."""
        self._change(song_id, worker, "state = 'failed', error = ?, ended = ?", error, time.time())
        self.drop(song_id)

    def give_back(self, song_id: str, worker: str) -> None:
        """Let a song that was begun wait again, in its place."""
        self._change(song_id, worker, "state = 'queued', stage = NULL, fraction = 0, attempts = attempts - 1")
        self.drop(song_id)

    def drop(self, song_id: str) -> None:
        """Remove what was made of a song, and all of one that was deleted meanwhile."""
        folder = self._songs / song_id
        with self._lock:
            row = self._row("SELECT state FROM songs WHERE id = ?", song_id)
        for part in [folder] if row is None else [folder / "work", folder / "result"]:
            shutil.rmtree(part, ignore_errors=True)
        self.live_file(song_id).unlink(missing_ok=True)

    # What the service does

    def recover(self) -> int:
        """Let songs that were being made when the process died wait again; return how many.

        One whose result is there already is done. Folders that belong to no song are removed.
        """
        with self._lock:
            rows = self._database.execute("SELECT * FROM songs WHERE state = 'running'").fetchall()
            for row in rows:
                self._recover(row)
            known = {row["id"] for row in self._database.execute("SELECT id FROM songs")}
        for folder in self.incoming.iterdir():  # of uploads that were cut off
            shutil.rmtree(folder, ignore_errors=True)
        for folder in self._songs.iterdir():
            shutil.rmtree(folder / "work" if folder.name in known else folder, ignore_errors=True)
            self.live_file(folder.name).unlink(missing_ok=True)
        return len(rows)

    def _recover(self, row: sqlite3.Row) -> None:
        song_id, worker, now = row["id"], row["worker"], time.time()
        try:
            report = read_json(self._songs / song_id / "result" / REPORT)
        except DataError:
            report = None
        if report is not None:
            change = ("state = 'done', fraction = 1, report = ?, ended = ?", json.dumps(report), now)
        elif row["attempts"] >= MOST_ATTEMPTS:
            told = f"the service ended {row['attempts']} times while it made this song; it is not tried again"
            change = ("state = 'failed', error = ?, ended = ?", told, now)
        else:
            change = ("state = 'queued', stage = NULL, fraction = 0",)
        self._change(song_id, worker, change[0], *change[1:])

    def expire(self, days: float) -> int:
        """Delete songs that ended more than so many days ago; return how many."""
        query = f"SELECT id FROM songs WHERE state IN {ENDED} AND ended < ?"
        with self._lock:
            old = [row["id"] for row in self._database.execute(query, (time.time() - days * 86_400,))]
        for song_id in old:
            with suppress(UnknownSongError):  # deleted meanwhile
                self.delete(song_id)
        return len(old)

    def count(self, state: str) -> int:
        """Return how many songs are in a state."""
        with self._lock:
            query = "SELECT count(*) FROM songs WHERE state = ?"
            return self._database.execute(query, (state,)).fetchone()[0]

    def _change(self, song_id: str, worker: str, change: str, *values: Any) -> bool:
        """Change a song that a worker is making; False where it is not its any more."""
        query = f"UPDATE songs SET {change} WHERE id = ? AND state = 'running' AND worker = ?"
        with self._lock:
            return self._database.execute(query, (*values, song_id, worker)).rowcount == 1

    def _row(self, query: str, *values: Any) -> sqlite3.Row | None:
        with closing(self._database.execute(query, values)) as cursor:
            return cursor.fetchone()

    def _guess_seconds(self) -> int:
        """About when a place in the queue becomes free."""
        query = "SELECT ended - started FROM songs WHERE state = 'done' ORDER BY ended DESC LIMIT 10"
        with self._lock:
            seconds = [row[0] for row in self._database.execute(query)]
        return max(1, round(sum(seconds) / len(seconds) if seconds else _USUAL_SECONDS))


def _copy(source: Recording, path: Path) -> None:
    with open(path, "xb") as file:
        if isinstance(source, Path):
            with open(source, "rb") as other:
                shutil.copyfileobj(other, file)
        else:
            shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())


def _link(source: Path, path: Path) -> None:
    """Let a file be at another place as well, by a copy where there are no links."""
    try:
        os.link(source, path)
    except FileNotFoundError:
        raise
    except OSError:
        _copy(source, path)


def _settle(*paths: Path) -> None:
    """Wait until files and folders are on the disk itself."""
    for path in paths if os.name != "nt" else ():
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
