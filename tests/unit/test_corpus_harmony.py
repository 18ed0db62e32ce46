"""Chord and key labels."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duotok.recipes.corpus.harmony import parse_chord, parse_root, simplify_chord, transpose_label
from duotok.tokenizer.common.errors import DataError


def test_chords_are_parsed():
    assert parse_chord("N") is None
    assert parse_chord("A:min7") == (9, (0, 3, 7, 10), 9)
    assert parse_chord("Bb:maj/3") == (10, (0, 4, 7), 2)
    assert parse_chord("F#:sus4(b7)") == (6, (0, 5, 7, 10), 6)


@pytest.mark.parametrize(
    "label, simple",
    [
        ("C:maj7/7", "C:maj"),
        ("Gb:min7", "F#:min"),
        ("D:sus4", "N"),
        ("B:dim", "N"),
        ("E:aug", "N"),
        ("N", "N"),
    ],
)
def test_chords_are_simplified(label: str, simple: str):
    assert simplify_chord(label) == simple


@given(st.sampled_from(["C", "C#", "Bb", "F#", "Gb"]), st.integers(-24, 24))
def test_transposition_goes_there_and_back(root: str, semitones: int):
    there = transpose_label(f"{root}:min7/b3", semitones)
    assert parse_root(there.split(":")[0]) == (parse_root(root) + semitones) % 12
    assert parse_chord(transpose_label(there, -semitones)) == parse_chord(f"{root}:min7/b3")


@pytest.mark.parametrize("name", ["", "H", "c", "Cx"])
def test_unknown_roots_are_refused(name: str):
    with pytest.raises(DataError):
        parse_root(name)
