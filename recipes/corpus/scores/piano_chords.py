"""Chords of a piano part that has no symbols: on each beat the triad that fits best, then its seventh.

A beat's notes are compared with the 24 triads, its lowest ones with their roots; what chords are usual in
the key (`tokenizer.music.progressions`) and where in a bar they change decide between what is equally near.
"""

from collections.abc import Sequence

import numpy as np

from duotok.recipes.corpus.scores.song import Note, Span
from duotok.tokenizer.music.harmony import find_path
from duotok.tokenizer.music.labels import NO_CHORD, count_fifths, key_of, name_chord
from duotok.tokenizer.music.progressions import load_progressions

# Found on the validation songs of POP909, whose chords are known.
MELODY_WEIGHT = 0.6  # of a sung note against one of the piano
BASS_WEIGHT = 0.3
FIT_WEIGHT = 14.0
KEY_WEIGHT = 0.2
CHANGE_COSTS = (1.0, 3.0, 2.0)  # into a downbeat, into another beat, into the middle of a bar
SEVENTH_SHARE = 0.12  # of what the piano plays while the chord lasts
TRIADS = np.array(
    [[(note - root) % 12 in (0, third, 7) for note in range(12)] for third in (4, 3) for root in range(12)]
)


def estimate_piano_chords(
    piano: Sequence[Note],
    melody: Sequence[Note],
    beats: Sequence[float],
    downbeats: Sequence[int],
    keys: Sequence[Span],
) -> list[Span]:
    """Chords that begin on beats and cover all of them; beats: seconds, with the end of the last one."""
    edges = np.asarray(beats)
    played = sum_notes(piano, edges)
    chroma = played + MELODY_WEIGHT * sum_notes(melody, edges)
    bass = sum_notes(lowest_notes(piano), edges)
    heard = chroma.sum(axis=1)
    chroma /= np.maximum(heard, 1e-9)[:, None]
    bass /= np.maximum(bass.sum(axis=1), 1e-9)[:, None]
    key = np.array(
        [
            key_of(next((k for k in reversed(keys) if k.start <= at + 1e-3), keys[0]).label)
            for at in edges[:-1]
        ]
    )
    # What lies outside the triad counts against it; the root counts twice.
    roots = np.concatenate([np.eye(12), np.eye(12)])
    fits = chroma @ (TRIADS + 0.5 * roots).T + BASS_WEIGHT * (bass @ (roots + 0.4 * TRIADS).T)
    scores = np.full((len(edges) - 1, NO_CHORD + 1), -100.0)
    scores[:, :NO_CHORD] = FIT_WEIGHT * fits + KEY_WEIGHT * load_progressions().chords[key]
    silent = heard < 0.05 * np.diff(edges)
    scores[silent] = -100.0
    scores[silent, NO_CHORD] = 0.0
    costs = np.full(len(scores), CHANGE_COSTS[1])
    starts = np.asarray(downbeats)
    costs[starts] = CHANGE_COSTS[0]
    halves = starts[:-1][np.diff(starts) % 2 == 0] + np.diff(starts)[np.diff(starts) % 2 == 0] // 2
    costs[halves] = np.minimum(costs[halves], CHANGE_COSTS[2])
    path = find_path(scores, costs)
    changes = [0, *(np.flatnonzero(np.diff(path)) + 1), len(path)]
    spans = []
    for first, end in zip(changes, changes[1:], strict=False):
        chord = int(path[first])
        label = name_chord(chord, count_fifths(int(key[first]) % 12, ("maj", "min")[key[first] // 12]))
        if chord < NO_CHORD:
            label = _with_seventh(label, chord, played[first:end].sum(axis=0))
        spans.append(Span(start=float(edges[first]), end=float(edges[end]), label=label))
    return spans


def _with_seventh(label: str, chord: int, played: np.ndarray) -> str:
    minor, major = played[(chord % 12 + 10) % 12], played[(chord % 12 + 11) % 12]
    if max(minor, major) < SEVENTH_SHARE * played.sum():
        return label
    if chord >= 12:
        return f"{label}7" if minor >= major else label
    return label.replace(":maj", ":7") if minor >= major else f"{label}7"


def sum_notes(notes: Sequence[Note], edges: np.ndarray) -> np.ndarray:
    """Seconds of each pitch class between each edge and the next: [edges - 1, 12]."""
    sums = np.zeros((len(edges) - 1, 12))
    for note in notes:
        first = max(int(np.searchsorted(edges, note.start, "right")) - 1, 0)
        for beat in range(first, len(sums)):
            if edges[beat] >= note.end:
                break
            sums[beat, note.pitch % 12] += max(
                0.0, min(note.end, edges[beat + 1]) - max(note.start, edges[beat])
            )
    return sums


def lowest_notes(notes: Sequence[Note]) -> list[Note]:
    """The notes that have none below them when they begin."""
    found: list[Note] = []
    sounding: list[Note] = []
    for note in sorted(notes, key=lambda note: (note.start, note.pitch)):
        sounding = [other for other in sounding if other.end > note.start + 0.03]
        if all(other.pitch >= note.pitch for other in sounding):
            found.append(note)
        sounding.append(note)
    return found
