"""The chords that this project tells apart: twelve major, twelve minor, none."""

PITCH_CLASSES = ("C", "C#", "D", "D#", "E", "F", "F#", "G", "G#", "A", "A#", "B")
CHORDS = 25
NO_CHORD = 24
CHORD_NAMES = (*(f"{name}:maj" for name in PITCH_CLASSES), *(f"{name}:min" for name in PITCH_CLASSES), "N")
