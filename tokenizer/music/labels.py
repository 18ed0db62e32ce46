"""Chord and key labels: the vocabulary of the models, one parser of the usual spellings, musicians' names.

Chords are read in Harte's syntax ("C:min7/b3", "N", "X"; C. Harte et al., Symbolic Representation of Musical
Chords, 2005) and as lead sheets have them ("Cm7/Eb", "N.C."). The models tell apart twelve major and twelve
minor triads and no chord.
"""

import re
from typing import NamedTuple

import numpy as np

from ..common.errors import DataError

CHORDS = 25  # 0-11 major, 12-23 minor
NO_CHORD = 24
UNKNOWN_CHORD = -1
_NO_CHORD_LABELS = ("N", "N.C.", "NC")
UNKNOWN_LABEL = "X"
_LONGEST_LABEL = 40
_MAJOR_SCALE = (0, 2, 4, 5, 7, 9, 11)
_NATURALS = dict(zip("CDEFGAB", _MAJOR_SCALE, strict=True))
_DEGREE = r"([#b]*)(\d{1,2})"
_SIGNS = str.maketrans("♯♭", "#b")
_CHANGE = re.compile(rf"[\s(),]*(add|omit|no|sus|\*)?{_DEGREE}[\s(),]*")


class Chord(NamedTuple):
    """A chord as it is written: its triad and its sixth or seventh; ninths and above are colours left out."""

    root: int  # pitch class, 0 = C
    intervals: tuple[int, ...]  # semitones above the root, which comes first
    bass: int  # pitch class


def _list_qualities() -> dict[str, tuple[int, ...]]:
    """Intervals of every spelling of a quality that further degrees may follow."""
    found = {"5": (0, 7), "Δ": (0, 4, 7, 11), "7alt": (0, 4, 7, 10)}
    found |= dict.fromkeys(("sus", "sus4"), (0, 5, 7)) | {"sus2": (0, 2, 7)}
    found |= {f"{seventh}{sus}": (0, 5, 7, 10) for seventh in (7, 9, 13) for sus in ("sus", "sus4")}
    found |= {"hdim": (0, 3, 6, 10), "hdim7": (0, 3, 6, 10), "ø": (0, 3, 6, 10), "ø7": (0, 3, 6, 10)}
    for names, triad, seventh in (
        (("",), (0, 4, 7), 10),
        (("maj", "Maj", "ma", "M", "Δ"), (0, 4, 7), 11),
        (("min", "mi", "m", "-"), (0, 3, 7), 10),
        (("minmaj", "mmaj", "mMaj", "mM", "m(maj", "m(M", "-Δ"), (0, 3, 7), 11),
        (("dim", "°", "o"), (0, 3, 6), 9),
        (("aug", "+"), (0, 4, 8), 10),
    ):
        for name in names:
            found.setdefault(name, triad)
            found |= {f"{name}{number}": (*triad, seventh) for number in (7, 9, 11, 13)}
            found[f"{name}6"] = (*triad, 9)
    return found


_QUALITIES = _list_qualities()


def parse_root(name: str) -> int:
    """Pitch class of a note name such as "Bb"; raises DataError for anything else."""
    if not name or name[0] not in _NATURALS or name[1:].strip("#b"):
        raise DataError(f"unknown root {name!r}")
    return (_NATURALS[name[0]] + name.count("#") - name[1:].count("b")) % 12


def parse_chord(label: str) -> Chord | None:
    """The chord that a label names, None for no chord; raises DataError for what is no chord (nor is "X")."""
    if label in _NO_CHORD_LABELS:
        return None
    if len(label) > _LONGEST_LABEL:
        raise DataError(f"{label[:_LONGEST_LABEL] + '...'!r} is no chord; write it as C:min7, Cm7, C/E or N")
    text = label.translate(_SIGNS).replace("6/9", "6(9)")
    found = re.fullmatch(r"([A-G][#b]*)(:?)(.*?)(?:/(?:([A-G][#b]*)|" + _DEGREE + "))?", text)
    if found is None or found[2] and not found[3]:
        raise DataError(f"{label!r} is no chord; write it as C:min7, Cm7, C/E or N")
    name, _, quality, bass_name, accidentals, degree = found.groups()
    root = parse_root(name)
    for end in range(len(quality), -1, -1):  # the longest spelling that the rest can follow
        intervals = _QUALITIES.get(quality[:end])
        intervals = intervals and _change(intervals, quality[end:])
        if intervals is not None:
            break
    else:
        raise DataError(f"{label!r} is no chord: {quality!r} is no quality; write it as C:min7, Cm7 or N")
    if bass_name:
        return Chord(root, intervals, parse_root(bass_name))
    return Chord(root, intervals, (root + (_semitones(accidentals, degree) if degree else 0)) % 12)


def nearest_triad(label: str) -> tuple[int, float]:
    """The chord number with the most notes of a label's, and the share of its notes that the label has.

    Of equals it is the one on the same root, major before minor. "X" is UNKNOWN_CHORD.
    """
    if label == UNKNOWN_LABEL:
        return UNKNOWN_CHORD, 0.0
    chord = parse_chord(label)
    if chord is None:
        return NO_CHORD, 1.0
    notes = {(chord.root + interval) % 12 for interval in chord.intervals}

    def shared(number: int) -> int:
        return len(notes & {(number + interval) % 12 for interval in (0, 3 if number >= 12 else 4, 7)})

    best = max(range(NO_CHORD), key=lambda number: (shared(number), number % 12 == chord.root, number < 12))
    return best, shared(best) / 3


def triad_of(label: str) -> int:
    """Chord class of a Harte label by the MIREX majmin rule: 0-11 major, 12-23 minor, 24 none, -1 neither."""
    chord = parse_chord(label)
    if chord is None:
        return NO_CHORD
    root, intervals, _ = chord
    triads: dict[tuple[int, ...], int] = {(0, 4, 7): root, (0, 3, 7): 12 + root}
    return triads.get(intervals[:3], UNKNOWN_CHORD)


def parse_key(label: str) -> int:
    """Key class of "Eb:min", "Ebm", "Eb minor" and the like; raises DataError for what is no key."""
    found = re.fullmatch(r"([A-G][#b]*)[\s:]*(maj|major|M|min|minor|m|)", label.strip().translate(_SIGNS))
    if found is None:
        raise DataError(f"{label[:_LONGEST_LABEL]!r} is no key; write it as C, Am, Eb:maj or F# minor")
    return parse_root(found[1]) + 12 * found[2].startswith("m") * (not found[2].startswith("maj"))


def name_key(key: int) -> str:
    """Label of a key class such as "Eb:min"."""
    mode = ("maj", "min")[key // 12]
    return f"{name_note(key % 12, count_fifths(key % 12, mode))}:{mode}"


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


def name_note(pitch_class: int, fifths: int = 0) -> str:
    """How musicians spell a pitch class in a key of so many sharps, flats below 0: Eb, not D#, in Bb."""
    place = (7 * pitch_class - fifths + 4) % 12 + fifths - 4  # on the line of fifths, C at 0
    place += 12 * ((place < -6) - (place > 10))  # rather B than Cb, F than E#
    accidentals, letter = divmod(place + 1, 7)
    return "FCGDAEB"[letter] + ("b" * -accidentals or "#" * accidentals)


def name_chord(number: int, fifths: int = 0) -> str:
    """Harte label of a chord number, spelled as in a key of so many sharps; "?" for UNKNOWN_CHORD."""
    if not 0 <= number < NO_CHORD:
        return "N" if number == NO_CHORD else "?"
    return f"{name_note(number % 12, fifths)}:{'min' if number >= 12 else 'maj'}"


def count_fifths(tonic: int, mode: str) -> int:
    """Sharps of a key "maj" or "min", flats below 0: from Db to F# major, from Eb to G# minor."""
    return (7 * tonic + 5) % 12 - 5 if mode == "maj" else (7 * (tonic + 3) + 6) % 12 - 6


PITCH_CLASSES = tuple(name_note(pitch_class) for pitch_class in range(12))
CHORD_NAMES = tuple(name_chord(number) for number in range(CHORDS))


def transpose_label(label: str, semitones: int) -> str:
    """A chord or key label in Harte's syntax, moved by semitones; "N" stays."""
    if label == "N":
        return label
    root, _, rest = label.partition(":")
    return f"{PITCH_CLASSES[(parse_root(root) + semitones) % 12]}:{rest}"


def _semitones(accidentals: str, degree: str) -> int:
    """Semitones above the root of a degree of the major scale."""
    return _MAJOR_SCALE[(int(degree) - 1) % 7] + accidentals.count("#") - accidentals.count("b")


def _change(intervals: tuple[int, ...], changes: str) -> tuple[int, ...] | None:
    """Intervals with degrees added, altered or left out ("b5", "(b7,9)", "add9", "no3"); else None."""
    place = 0
    while place < len(changes):
        found = _CHANGE.match(changes, place)
        if found is None or not 1 <= int(found[3]) <= 13:
            return None
        kind, degree, tone = found[1], int(found[3]), _semitones(found[2], found[3])
        place = found.end()
        replaced = {3: (3, 4), 5: (6, 7, 8), 7: (10, 11)}.get(3 if kind == "sus" else degree, ())
        kept = tuple(interval for interval in intervals if interval not in replaced)
        if kind in ("no", "omit", "*"):
            intervals = kept
        elif kind == "sus":
            intervals = (kept[0], tone, *kept[1:])
        elif degree in (3, 5) or degree == 7 and tone not in intervals:
            at = (degree - 1) // 2
            intervals = (*kept[:at], tone, *kept[at:]) if degree < 7 else (*intervals, tone)
        elif degree == 6 and tone not in intervals:
            intervals = (*intervals, tone)
    return intervals
