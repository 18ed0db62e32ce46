"""Chord and key labels: Harte's syntax and lead sheets, the nearest triad, how notes are spelled."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.harmony import Key
from duotok.tokenizer.music.labels import (
    CHORDS,
    NO_CHORD,
    UNKNOWN_CHORD,
    name_chord,
    nearest_triad,
    parse_chord,
    parse_root,
    transpose_label,
)


@pytest.mark.parametrize(
    ("label", "chord"),
    [
        ("N", None),
        ("N.C.", None),
        ("A:min7", (9, (0, 3, 7, 10), 9)),
        ("Bb:maj/3", (10, (0, 4, 7), 2)),
        ("F#:sus4(b7)", (6, (0, 5, 7, 10), 6)),
        ("C:sus4(b7,9)", (0, (0, 5, 7, 10), 0)),
        ("C:7(*5,b9)/b7", (0, (0, 4, 10), 10)),
        ("C:maj(2)/2", (0, (0, 4, 7), 2)),
        ("Am", (9, (0, 3, 7), 9)),
        ("B♭maj7", (10, (0, 4, 7, 11), 10)),
        ("F#m7b5", (6, (0, 3, 6, 10), 6)),
        ("D/F#", (2, (0, 4, 7), 6)),
        ("C6/9", (0, (0, 4, 7, 9), 0)),
        ("Cm(maj7)", (0, (0, 3, 7, 11), 0)),
        ("G7sus4", (7, (0, 5, 7, 10), 7)),
        ("E7b9sus4", (4, (0, 5, 7, 10), 4)),
        ("C+7", (0, (0, 4, 8, 10), 0)),
        ("Cno3", (0, (0, 7), 0)),
    ],
)
def test_chords_are_parsed(label: str, chord: tuple[int, tuple[int, ...], int] | None) -> None:
    assert parse_chord(label) == chord


@pytest.mark.parametrize(
    "label",
    [
        "",
        "C:",
        "C:blah",
        "Cfoo",
        "H:maj",
        "c",
        "Cx",
        "C/",
        "C/x",
        "C:maj(99)",
        "C(0)",
        "C:()",
        "2",
        "C" + 99 * "9",
    ],
)
def test_what_is_no_chord_is_refused(label: str) -> None:
    with pytest.raises(DataError, match="is no chord"):
        parse_chord(label)


@pytest.mark.parametrize(
    ("label", "nearest", "share"),
    [
        ("C:maj7/7", "C:maj", 1),
        ("Gb:min7", "F#:min", 1),
        ("Dsus4", "D:maj", 2 / 3),
        ("B:dim", "B:min", 2 / 3),
        ("E+", "E:maj", 2 / 3),
        ("C5", "C:maj", 2 / 3),
        ("F#m7b5", "A:min", 1),  # its upper three notes
        ("NC", "N", 1),
        ("X", "?", 0),
    ],
)
def test_the_nearest_triad_and_how_near_it_is(label: str, nearest: str, share: float) -> None:
    number, found = nearest_triad(label)
    assert (name_chord(number), found) == (nearest, pytest.approx(share))


def test_every_chord_number_has_a_name_that_is_read_as_itself() -> None:
    for fifths in range(-6, 7):
        assert [nearest_triad(name_chord(number, fifths))[0] for number in range(CHORDS)] == [*range(CHORDS)]
    assert name_chord(NO_CHORD) == "N" and name_chord(UNKNOWN_CHORD) == "?"


@pytest.mark.parametrize(
    ("tonic", "mode", "name", "chords"),
    [
        (3, "maj", "Eb:maj", {8: "Ab:maj", 10: "Bb:maj", 6: "Gb:maj"}),
        (4, "maj", "E:maj", {8: "G#:maj", 10: "A#:maj", 6: "F#:maj"}),
        (0, "maj", "C:maj", {8: "Ab:maj", 10: "Bb:maj", 6: "F#:maj"}),
        (10, "min", "Bb:min", {1: "Db:maj", 18: "Gb:min"}),
        (8, "min", "G#:min", {3: "D#:maj", 11: "B:maj"}),
        (1, "maj", "Db:maj", {11: "B:maj"}),
    ],
)
def test_keys_and_their_chords_are_spelled_as_musicians_do(
    tonic: int, mode: str, name: str, chords: dict[int, str]
) -> None:
    key = Key(tonic=tonic, mode=mode)
    assert str(key) == name
    assert {number: name_chord(number, key.fifths) for number in chords} == chords


@given(st.sampled_from(["C", "C#", "Bb", "F#", "Gb"]), st.integers(-24, 24))
def test_transposition_goes_there_and_back(root: str, semitones: int) -> None:
    there = transpose_label(f"{root}:min7/b3", semitones)
    assert parse_root(there.split(":")[0]) == (parse_root(root) + semitones) % 12
    assert parse_chord(transpose_label(there, -semitones)) == parse_chord(f"{root}:min7/b3")


@pytest.mark.parametrize("name", ["", "H", "c", "Cx"])
def test_unknown_roots_are_refused(name: str) -> None:
    with pytest.raises(DataError):
        parse_root(name)
