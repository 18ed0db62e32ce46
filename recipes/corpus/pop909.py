"""POP909 (Wang et al. 2020): pop melodies with piano arrangement, beats, chords and keys, by song number."""

import io
import re
import tarfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import name_note, parse_root

SPLIT_SONGS = {"train": range(1, 819), "validation": range(819, 864), "test": range(864, 910)}
SONG_FILES = ("beat_midi.txt", "chord_midi.txt", "key_audio.txt")
MEMBER = re.compile(r"(?:^|/)(\d{3})/(\d{3}\.mid|beat_midi\.txt|chord_midi\.txt|key_audio\.txt)$")
LONGEST_FILE_BYTES = 4_000_000
LONGEST_PEDAL_SECONDS = 2.0


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note: seconds, MIDI pitch and velocity."""

    start: float
    end: float
    pitch: int
    velocity: int


@dataclass(frozen=True, kw_only=True)
class Span:
    """A labelled stretch of time in seconds (a chord or a key)."""

    start: float
    end: float
    label: str


@dataclass(frozen=True, kw_only=True)
class Song:
    """One song as POP909 gives it; times in seconds."""

    name: str
    melody: tuple[Note, ...]  # monophonic
    piano: tuple[Note, ...]
    beats: tuple[float, ...]
    downbeats: tuple[int, ...]  # indices into beats
    chords: tuple[Span, ...]
    keys: tuple[Span, ...]


class Songs:
    """The songs of a POP909 folder or tar.gz; nothing is ever unpacked to disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.is_dir():
            self.files = _read_folder(self.path)
        elif self.path.is_file():
            self.files = _read_archive(self.path)
        else:
            raise DataError(
                f"{self.path} does not exist; give the POP909 folder or tar.gz "
                "(github.com/music-x-lab/POP909-Dataset)"
            )
        if not self.names:
            raise DataError(f"{self.path} holds no POP909 song (a folder such as 001 with 001.mid in it)")

    @property
    def names(self) -> list[str]:
        """The numbers of the complete songs, in order."""
        songs = {song for song, _ in self.files}
        return sorted(
            song for song in songs if all((song, name) in self.files for name in (*SONG_FILES, f"{song}.mid"))
        )

    def of_split(self, split: str) -> list[str]:
        """The numbers of the songs of a split."""
        names = [name for name in self.names if int(name) in SPLIT_SONGS[split]]
        if not names:
            raise DataError(f"{self.path} holds no song of the {split} split")
        return names

    def read(self, name: str) -> Song:
        """Parse one song; raises DataError naming the song when a file of it is broken."""
        try:
            return _parse_song(name, {file: self.files[name, file] for file in (*SONG_FILES, f"{name}.mid")})
        except (OSError, EOFError, ValueError, IndexError, KeyError) as error:
            raise DataError(f"song {name} of {self.path} is broken: {error}") from error


def _read_folder(path: Path) -> dict[tuple[str, str], bytes]:
    files = {}
    for file in sorted([*path.glob("[0-9]*/*"), *path.glob("*/[0-9]*/*")]):
        match = MEMBER.search(file.as_posix())
        if match and file.is_file() and file.stat().st_size <= LONGEST_FILE_BYTES:
            files[match[1], match[2]] = file.read_bytes()
    return files


def _read_archive(path: Path) -> dict[tuple[str, str], bytes]:
    # Members are only read into memory, under names that match MEMBER: no path of theirs reaches the disk.
    files = {}
    try:
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                match = MEMBER.search(member.name)
                if not match or not member.isfile() or member.size > LONGEST_FILE_BYTES:
                    continue
                opened = archive.extractfile(member)
                if opened is not None:
                    files.setdefault((match[1], match[2]), opened.read())
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is not a readable tar archive: {error}") from error
    return files


def _parse_song(name: str, files: dict[str, bytes]) -> Song:
    beats, marks = [], []
    for line in files["beat_midi.txt"].decode().splitlines():
        if line.strip():
            time, simple, compound = (float(value) for value in line.split())
            beats.append(time)
            marks.append((simple > 0, compound > 0))
    if len(beats) < 16:
        raise ValueError(f"only {len(beats)} beats")
    if any(later <= earlier for earlier, later in zip(beats, beats[1:], strict=False)):
        raise ValueError("the beats are not in order")
    column = 1 if sum(mark[1] for mark in marks) >= 2 else 0
    downbeats = tuple(index for index, mark in enumerate(marks) if mark[column])
    # In some songs the first beat is marked as a downbeat outside the metre.
    if len(downbeats) > 2 and downbeats[1] - downbeats[0] != downbeats[2] - downbeats[1]:
        downbeats = downbeats[1:]
    if not downbeats:
        raise ValueError("no downbeats")
    tracks = _read_tracks(files[f"{name}.mid"])
    if not tracks.get("MELODY"):
        raise ValueError("no MELODY track")
    piano = sorted(tracks.get("PIANO", []) + tracks.get("BRIDGE", []), key=lambda note: note.start)
    return Song(
        name=name,
        melody=tuple(make_monophonic(tracks["MELODY"])),
        piano=tuple(piano),
        beats=tuple(beats),
        downbeats=downbeats,
        chords=tuple(_read_spans(files["chord_midi.txt"])),
        keys=tuple(_read_spans(files["key_audio.txt"])),
    )


def _read_spans(content: bytes) -> list[Span]:
    spans = []
    for line in content.decode().splitlines():
        if line.strip():
            start, end, label = line.split()
            if label != "N":
                root, _, quality = label.partition(":")
                label = f"{name_note(parse_root(root))}:{quality or 'maj'}"
            spans.append(Span(start=float(start), end=float(end), label=label))
    return spans


def _read_tracks(content: bytes) -> dict[str, list[Note]]:
    """Notes by track name, in seconds, with the sustain pedal written out into the durations."""
    midi = mido.MidiFile(file=io.BytesIO(content), clip=True)
    tempos = [(0, 500_000)]
    for track in midi.tracks:
        tick = 0
        for message in track:
            tick += message.time
            if message.type == "set_tempo":
                tempos.append((tick, message.tempo))
    tempos.sort(key=lambda tempo: tempo[0])
    ticks = np.array([tempo[0] for tempo in tempos], dtype=float)
    rates = np.array([tempo[1] for tempo in tempos]) / 1e6 / midi.ticks_per_beat  # seconds per tick
    seconds = np.concatenate([[0.0], np.cumsum(np.diff(ticks) * rates[:-1])])

    def to_seconds(tick: int) -> float:
        index = int(np.searchsorted(ticks, tick, side="right")) - 1
        return float(seconds[index] + (tick - ticks[index]) * rates[index])

    tracks: dict[str, list[Note]] = {}
    for track in midi.tracks:
        tick, held, down = 0, {}, None
        notes: list[list[float]] = []  # start, end, pitch, velocity
        pedals: list[tuple[float, float]] = []
        for message in track:
            tick += message.time
            if message.type == "note_on" and message.velocity > 0:
                held.setdefault(message.note, []).append((tick, message.velocity))
            elif message.type in ("note_off", "note_on") and held.get(message.note):
                start, velocity = held[message.note].pop(0)
                if tick > start:
                    notes.append([to_seconds(start), to_seconds(tick), message.note, velocity])
            elif message.type == "control_change" and message.control == 64:
                if message.value >= 64 and down is None:
                    down = to_seconds(tick)
                elif message.value < 64 and down is not None:
                    pedals.append((down, to_seconds(tick)))
                    down = None
        tracks[track.name] = _apply_pedal(notes, pedals)
    return tracks


def _apply_pedal(notes: list[list[float]], pedals: list[tuple[float, float]]) -> list[Note]:
    notes = sorted(notes)
    next_start: dict[int, float] = {}
    starts = np.array([pedal[0] for pedal in pedals])
    result = []
    for start, end, pitch, velocity in reversed(notes):
        index = int(np.searchsorted(starts, end, side="right")) - 1 if len(pedals) else -1
        if index >= 0 and end < pedals[index][1]:
            end = min(pedals[index][1], end + LONGEST_PEDAL_SECONDS)
        end = max(min(end, next_start.get(int(pitch), end)), start + 0.02)
        next_start[int(pitch)] = start
        result.append(Note(start=start, end=end, pitch=int(pitch), velocity=int(velocity)))
    return result[::-1]


def make_monophonic(notes: list[Note], shortest_seconds: float = 0.06) -> list[Note]:
    """One voice: the higher of simultaneous notes, each cut at the next one's start; specks dropped."""
    line: list[Note] = []
    for note in sorted(notes, key=lambda note: (note.start, -note.pitch)):
        if line and note.start - line[-1].start < shortest_seconds:
            continue
        line.append(note)
    cut = []
    for note, following in zip(line, [*line[1:], None], strict=True):
        end = note.end if following is None else min(note.end, following.start)
        if end - note.start >= shortest_seconds:
            cut.append(Note(start=note.start, end=end, pitch=note.pitch, velocity=note.velocity))
    return cut
