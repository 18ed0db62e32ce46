"""Chord and key labels (Harte syntax) as pitch classes, transposed and simplified."""

from duotok.tokenizer.common.errors import DataError

ROOTS = ("C", "C#", "D", "Eb", "E", "F", "F#", "G", "Ab", "A", "Bb", "B")
NATURALS = {"C": 0, "D": 2, "E": 4, "F": 5, "G": 7, "A": 9, "B": 11}
QUALITIES = {
    "maj": (0, 4, 7),
    "min": (0, 3, 7),
    "7": (0, 4, 7, 10),
    "maj7": (0, 4, 7, 11),
    "min7": (0, 3, 7, 10),
    "maj6": (0, 4, 7, 9),
    "min6": (0, 3, 7, 9),
    "minmaj7": (0, 3, 7, 11),
    "dim": (0, 3, 6),
    "dim7": (0, 3, 6, 9),
    "hdim7": (0, 3, 6, 10),
    "aug": (0, 4, 8),
    "sus2": (0, 2, 7),
    "sus4": (0, 5, 7),
    "sus4(b7)": (0, 5, 7, 10),
}
BASS_DEGREES = {"3": 4, "b3": 3, "5": 7, "7": 11, "b7": 10, "2": 2, "4": 5, "6": 9}


def parse_root(name: str) -> int:
    """Pitch class of a root name such as "Bb"."""
    if not name or name[0] not in NATURALS or name[1:].strip("#b"):
        raise DataError(f"unknown root {name!r}")
    return (NATURALS[name[0]] + name.count("#") - name[1:].count("b")) % 12


def name_root(pitch_class: int) -> str:
    """The name used in this corpus for a pitch class."""
    return ROOTS[pitch_class % 12]


def transpose_label(label: str, semitones: int) -> str:
    """A chord or key label moved by semitones; "N" stays."""
    if label == "N":
        return label
    root, _, rest = label.partition(":")
    return f"{name_root(parse_root(root) + semitones)}:{rest}"


def parse_chord(label: str) -> tuple[int, tuple[int, ...], int] | None:
    """Root pitch class, intervals above it and bass pitch class; None for "N"."""
    if label == "N":
        return None
    root_name, _, rest = label.partition(":")
    quality, _, degree = rest.partition("/")
    root = parse_root(root_name)
    intervals = QUALITIES.get(quality) or QUALITIES["min" if quality.startswith("min") else "maj"]
    return root, intervals, (root + BASS_DEGREES.get(degree, 0)) % 12


def drop_bass(label: str) -> str:
    """The label without its inversion: "C:maj/3" -> "C:maj"."""
    return label.partition("/")[0]


def simplify_chord(label: str) -> str:
    """Major or minor triad or "N" by the third of the chord (the MIREX majmin rule)."""
    chord = parse_chord(label)
    if chord is None or 3 not in chord[1] and 4 not in chord[1]:
        return "N"
    if chord[1][:3] in ((0, 3, 6), (0, 4, 8)):
        return "N"
    return f"{name_root(chord[0])}:{'min' if 3 in chord[1] else 'maj'}"
