"""What every source of scores gives: a song, and excerpts of it.

An `Excerpt` is a stretch of a song or the whole of it, moved to another tempo and key: the score that one
item is rendered from.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import transpose_label

SHORTEST_SECONDS, LONGEST_SECONDS = 30.0, 60.0
SUNG_SHARE = 0.4  # least part of an excerpt with a sung note
LATEST_ENTRY_SECONDS = 8.0  # of the first sung note
SHORTEST_SONG_SECONDS, LONGEST_SONG_SECONDS = 120.0, 300.0
RING_SECONDS = 3.0  # of a whole song after its last note


@dataclass(frozen=True, kw_only=True)
class Note:
    """A note: seconds, MIDI pitch and velocity; of a melody also the syllable that is sung on it."""

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
    """One song as its source gives it, repeats played out; times in seconds."""

    name: str  # within its source
    source: str = "pop909"  # or "openewld", "lieder"
    beats_per_bar: int = 4  # 2, 3, 4 or 6 (of most bars); of 6 the beats are eighths or what counts like them
    language: str = ""  # of the notes' text: "en", "de", "fr", ...; "" = no words, or nobody knows
    melody: tuple[Note, ...]  # monophonic
    piano: tuple[Note, ...]  # empty: the source has a lead sheet only
    beats: tuple[float, ...]
    downbeats: tuple[int, ...]  # indices into beats
    chords: tuple[Span, ...]
    keys: tuple[Span, ...]


class Songs(ABC):
    """The songs of one source; nothing is ever unpacked to disk."""

    source: str

    def __init__(self, path: Path, names: list[str]) -> None:
        """path: where they come from, for messages."""
        self.path, self.names = path, names

    @abstractmethod
    def split_of(self, name: str) -> str:
        """The split that a song belongs to."""

    @abstractmethod
    def read(self, name: str) -> Song:
        """Parse one song; raises DataError naming the song when it is broken or nothing to sing."""

    def of_split(self, split: str) -> list[str]:
        """The names of the songs of a split, in order."""
        names = [name for name in self.names if self.split_of(name) == split]
        if not names:
            raise DataError(f"{self.path} holds no song of the {split} split")
        return names


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
            cut.append(replace(note, end=end))
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
    beats_per_bar: int = 4  # these three as of the song
    language: str = ""
    source: str = "pop909"
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
            replace(
                note,
                start=max((note.start - start) * stretch, 0.0),
                end=(min(note.end, end) - start) * stretch,
                pitch=note.pitch + semitones,
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
        beats_per_bar=song.beats_per_bar,
        language=song.language,
        source=song.source,
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
