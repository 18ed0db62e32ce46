"""The labels of an item as the classes that models tell apart: chords of blocks of time, the key."""

import numpy as np

from duotok.recipes.corpus.harmony import parse_chord, parse_root
from duotok.recipes.corpus.manifest import Item
from duotok.tokenizer.music.chord_names import NO_CHORD

UNKNOWN_CHORD = -1  # neither major nor minor nor silence: sus, dim, aug


def is_labelled(item: Item) -> bool:
    """Whether the chords and the key of an item are known."""
    return bool(item.chords) and bool(item.key)


def triad_of(label: str) -> int:
    """Chord class of a Harte label by the MIREX majmin rule: 0-11 major, 12-23 minor, 24 none, -1 neither."""
    chord = parse_chord(label)
    if chord is None:
        return NO_CHORD
    root, intervals, _ = chord
    triads: dict[tuple[int, ...], int] = {(0, 4, 7): root, (0, 3, 7): 12 + root}
    return triads.get(intervals[:3], UNKNOWN_CHORD)


def key_of(label: str) -> int:
    """Key class of a label such as "Eb:min": 0-11 major, 12-23 minor."""
    root, _, mode = label.partition(":")
    return parse_root(root) + 12 * (mode == "min")


def chords_of_blocks(chords: list[tuple[float, float, str]], count: int, rate_hz: float) -> np.ndarray:
    """Chord class [count] of each block of 1 / rate_hz seconds, by what sounds in its middle."""
    middles = (np.arange(count) + 0.5) / rate_hz
    classes = np.full(count, UNKNOWN_CHORD)
    for start, end, label in chords:
        classes[(middles >= start) & (middles < end)] = triad_of(label)
    return classes
