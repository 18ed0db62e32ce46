"""A stretch of a song, moved to another tempo and key: the score that one item is rendered from."""

from dataclasses import dataclass

import numpy as np

from duotok.recipes.corpus.pop909 import Note, Song, Span
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import transpose_label

SHORTEST_SECONDS, LONGEST_SECONDS = 30.0, 60.0
SUNG_SHARE = 0.4  # least part of an excerpt with a sung note
LATEST_ENTRY_SECONDS = 8.0  # of the first sung note


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
    key: str

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
    start, end = choose_bars(song, stretch, rng)

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
    key = max(song.keys, key=lambda span: min(span.end, end) - max(span.start, start)).label
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
        key=transpose_label(key, semitones),
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
