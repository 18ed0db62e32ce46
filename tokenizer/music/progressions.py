"""How pop songs move: chords and sung notes of a key, changes of chord.

Counted in the training scores of POP909 by `python -m duotok.recipes.tokenizer.count_progressions`; the
tables beside this file hold logarithms of shares. All twelve keys share what is relative to the tonic.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from .labels import NO_CHORD

KEYS = 24  # twelve major, twelve minor
TABLES = Path(__file__).with_suffix(".safetensors")


@dataclass(frozen=True, kw_only=True)
class Progressions:
    """Logarithms of shares in every key: 0-11 major, 12-23 minor; of chords without NO_CHORD."""

    chords: np.ndarray  # [keys, chords] how often a chord sounds
    changes: np.ndarray  # [keys, chords, chords] what follows when a chord changes; never itself
    pitches: np.ndarray  # [keys, 12] how often a pitch class is sung, over chance


@cache
def load_progressions() -> Progressions:
    """The tables that ship with the package."""
    tables = load_file(TABLES)
    return Progressions(
        chords=_in_all_keys(tables["chords"], 1),
        changes=_in_all_keys(tables["changes"], 2),
        pitches=np.stack([np.roll(row, tonic) for row in tables["pitches"] for tonic in range(12)]),
    )


def relative_to(chord: np.ndarray | int, tonic: np.ndarray | int) -> np.ndarray:
    """Chords 0..23 as if the tonic were C."""
    return (np.asarray(chord) - tonic) % 12 + np.asarray(chord) // 12 * 12


def _in_all_keys(table: np.ndarray, axes: int) -> np.ndarray:
    """Table [2 modes, chords, ...] over C -> [keys, chords, ...], along each of the axes of chords."""
    found = []
    for rows in table:
        for tonic in range(12):
            index = relative_to(np.arange(NO_CHORD), tonic)
            found.append(rows[index] if axes == 1 else rows[np.ix_(index, index)])
    return np.stack(found)
