"""POP909 (Wang et al. 2020): pop melodies with piano arrangement, beats, chords and keys, by song number.

An `Excerpt` is a stretch of a song or the whole of it, moved to another tempo and key: the score that one
item is rendered from.
"""

import io
import re
import tarfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import mido
import numpy as np

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import name_note, parse_root, transpose_label

SPLIT_SONGS = {"train": range(1, 819), "validation": range(819, 864), "test": range(864, 910)}
SONG_FILES = ("beat_midi.txt", "chord_midi.txt", "key_audio.txt")
MEMBER = re.compile(r"(?:^|/)(\d{3})/(\d{3}\.mid|beat_midi\.txt|chord_midi\.txt|key_audio\.txt)$")
LONGEST_FILE_BYTES = 4_000_000
LONGEST_PEDAL_SECONDS = 2.0
SHORTEST_SECONDS, LONGEST_SECONDS = 30.0, 60.0
SUNG_SHARE = 0.4  # least part of an excerpt with a sung note
LATEST_ENTRY_SECONDS = 8.0  # of the first sung note
SHORTEST_SONG_SECONDS, LONGEST_SONG_SECONDS = 120.0, 300.0
RING_SECONDS = 3.0  # of a whole song after its last note


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note: seconds, MIDI pitch and velocity."""

    start: float
    end: float
    pitch: int
    velocity: int
    # Plain letters as the score spells them; a word's syllables but the last end in "-" ("ro-", "ses").
    # "-" alone: the syllable before is held on (melisma). "": the score has no words here.
    text: str = ""


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


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """The score of one item; all times in seconds from its start."""

    song: str
    seconds: float
    melody: tuple[Note, ...]
    piano: tuple[Note, ...]
    beats: tuple[float, ...]
    downbeats: tuple[int, ...]  # indices into beats
    chords: tuple[Span, ...]  # cover the excerpt without gaps; labels may have inversions
    keys: tuple[Span, ...]  # in order; at least one
    language: str = ""
    last_bar_seconds: float | None = None  # of a whole song: from here on its chords only ring out

    @property
    def key(self) -> str:
        """The key that most of it is in."""
        labels = dict.fromkeys(span.label for span in self.keys)
        return max(
            labels, key=lambda label: sum(span.end - span.start for span in self.keys if span.label == label)
        )

    @property
    def beat_seconds(self) -> float:
        """The usual distance of two beats."""
        return float(np.median(np.diff(self.beats)))


def choose_bars(song: Song, stretch: float, rng: np.random.Generator) -> tuple[float, float]:
    """Start and end (seconds of the song, both on downbeats) of a stretch with enough singing.

    stretch: duration of the excerpt per duration of the song (1.1 = slower by 10 %).
    """
    times = [song.beats[index] for index in song.downbeats]
    wanted = rng.uniform(SHORTEST_SECONDS, LONGEST_SECONDS - 4.0) / stretch
    starts = np.array([note.start for note in song.melody])
    ends = np.array([note.end for note in song.melody])
    choices = []
    for start in times:
        later = [time for time in times if wanted <= time - start <= LONGEST_SECONDS / stretch]
        end = later[0] if later else min(start + wanted, song.beats[-1])
        if end - start < min(SHORTEST_SECONDS / stretch, (times[-1] - times[0]) * 0.8):
            continue
        overlaps = np.minimum(ends, end) - np.maximum(starts, start)
        sung = float(np.clip(overlaps, 0, None).sum()) / (end - start)
        inside = starts[starts >= start - 0.03]
        entry = (inside[0] - start) * stretch if len(inside) else np.inf
        choices.append((sung >= SUNG_SHARE and entry <= LATEST_ENTRY_SECONDS, sung, start, end, entry))
    if not choices:
        raise DataError(f"song {song.name} has no stretch of {SHORTEST_SECONDS:.0f} s between downbeats")
    good = [choice for choice in choices if choice[0]]
    # Most downbeats have a note at once: two of three items look for an instrumental start first.
    late = [choice for choice in good if choice[4] >= rng.uniform(0.5, 6.0)]
    pool = late if late and rng.random() < 0.67 else good
    chosen = pool[rng.integers(len(pool))] if pool else max(choices, key=lambda choice: choice[1])
    return chosen[2], chosen[3]


def cut_excerpt(song: Song, rng: np.random.Generator, *, stretch: float, semitones: int) -> Excerpt:
    """A random stretch of the song, slower by `stretch` and higher by `semitones`."""
    return _cut(song, *choose_bars(song, stretch, rng), stretch=stretch, semitones=semitones)


def whole_song(song: Song, *, stretch: float, semitones: int) -> Excerpt:
    """All of the song, slower by `stretch` as far as it stays within 2 to 5 minutes; its end rings out.

    Raises DataError for a song that is shorter or longer by itself.
    """
    played = max(song.melody[-1].end, song.beats[-1], *(note.end for note in song.piano))
    length = played + RING_SECONDS
    if not SHORTEST_SONG_SECONDS <= length <= LONGEST_SONG_SECONDS:
        raise DataError(
            f"song {song.name} lasts {length:.0f} s; whole songs last "
            f"{SHORTEST_SONG_SECONDS:.0f} to {LONGEST_SONG_SECONDS:.0f} s"
        )
    stretch = float(np.clip(stretch, SHORTEST_SONG_SECONDS / length, LONGEST_SONG_SECONDS / length))
    whole = _cut(song, 0.0, length, stretch=stretch, semitones=semitones)
    sounding = [span for span in whole.chords if span.label != "N"]
    last_bar = whole.beats[whole.downbeats[-1]]
    if not sounding:
        raise DataError(f"song {song.name} has no chords")
    last = replace(sounding[-1], end=whole.seconds)
    ringing = played * stretch - 0.5  # what sounds until here is not damped
    piano = tuple(
        replace(note, end=whole.seconds) if note.start >= last_bar and note.end > ringing else note
        for note in whole.piano
    )
    before = tuple(span for span in whole.chords if span.start < last.start)
    return replace(whole, piano=piano, chords=(*before, last), last_bar_seconds=last_bar)


def _cut(song: Song, start: float, end: float, *, stretch: float, semitones: int) -> Excerpt:
    """The song from `start` to `end` in its own seconds."""

    def moved(notes: tuple[Note, ...]) -> tuple[Note, ...]:
        return tuple(
            Note(
                start=max((note.start - start) * stretch, 0.0),
                end=(min(note.end, end) - start) * stretch,
                pitch=note.pitch + semitones,
                velocity=note.velocity,
            )
            for note in notes
            if start - 0.03 <= note.start < end - 0.05
        )

    inside = [index for index, time in enumerate(song.beats) if start - 1e-6 <= time < end - 1e-6]
    beats = tuple((song.beats[index] - start) * stretch for index in inside)
    downbeats = tuple(index - inside[0] for index in song.downbeats if inside[0] <= index <= inside[-1])
    inside_keys = [span for span in song.keys if min(span.end, end) > max(span.start, start)]
    if not inside_keys:  # an excerpt of what the labels leave out: the nearest key
        inside_keys = [max(song.keys, key=lambda span: min(span.end, end) - max(span.start, start))]
    melody = moved(song.melody)
    if not melody or len(beats) < 4:
        raise DataError(f"song {song.name}: no melody between {start:.1f} and {end:.1f} s")
    return Excerpt(
        song=song.name,
        seconds=(end - start) * stretch,
        melody=melody,
        piano=moved(song.piano),
        beats=beats,
        downbeats=downbeats,
        chords=tuple(_cut_chords(song.chords, start, end, stretch, semitones)),
        keys=tuple(
            Span(
                start=(max(span.start, start) - start) * stretch,
                end=(min(span.end, end) - start) * stretch,
                label=transpose_label(span.label, semitones),
            )
            for span in inside_keys
        ),
    )


def _cut_chords(
    chords: tuple[Span, ...], start: float, end: float, stretch: float, semitones: int
) -> list[Span]:
    spans: list[Span] = []
    position = 0.0

    def add(until: float, label: str) -> None:
        nonlocal position
        if until <= position + 1e-6:
            return
        if spans and spans[-1].label == label:
            spans[-1] = Span(start=spans[-1].start, end=until, label=label)
        else:
            spans.append(Span(start=position, end=until, label=label))
        position = until

    for chord in sorted(chords, key=lambda span: span.start):
        if chord.end <= start or chord.start >= end:
            continue
        add((max(chord.start, start) - start) * stretch, "N")
        add((min(chord.end, end) - start) * stretch, transpose_label(chord.label, semitones))
    add((end - start) * stretch, "N")
    return spans


def label_chords(excerpt: Excerpt) -> list[tuple[float, float, str]]:
    """The chord labels of a manifest: no inversions, equal neighbours joined, times to 0.1 ms."""
    labels: list[tuple[float, float, str]] = []
    for span in excerpt.chords:
        label = span.label.partition("/")[0]  # without its inversion
        if labels and labels[-1][2] == label:
            labels[-1] = (labels[-1][0], round(span.end, 4), label)
        else:
            labels.append((round(span.start, 4), round(span.end, 4), label))
    return labels
