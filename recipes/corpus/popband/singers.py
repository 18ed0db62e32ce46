"""What real singers do and the tidy ones of the corpus do not: drawn for training items, each thing rarely.

They drift, slide and fall, have other bodies and other octaves, hum, talk, sing in two voices, and stand in a
room or before a telephone.
"""

from dataclasses import dataclass, replace

import numpy as np

from duotok.recipes.corpus.popband.singing import PHRASE_GAP, Manner
from duotok.recipes.corpus.scores.song import Note
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.music.labels import parse_root

SCALES = {"maj": (0, 2, 4, 5, 7, 9, 11), "min": (0, 2, 3, 5, 7, 8, 10)}
TELEPHONE_HZ = ((200, 400), (2_800, 4_500))  # ranges of the lowest and the highest frequency of one


@dataclass(frozen=True, kw_only=True)
class Singer:
    """How the singer of one item differs from a tidy one."""

    octave: int = 0  # semitones that the melody is moved by
    spoken: float = 0.0  # part of the phrases that are spoken in rhythm
    in_thirds: bool = False  # a second singer a third above
    room: tuple[float, float] | None = None  # seconds of its reverberation, its level in dB
    over_phone: bool = False


def draw_singer(rng: np.random.Generator) -> Singer:
    """A random singer; most are tidy in most of this."""
    octave, spoken, thirds, room, phone = rng.random(5) < (0.08, 0.06, 0.06, 0.15, 0.08)
    return Singer(
        octave=int(rng.choice([-12, 12])) if octave else 0,
        spoken=float(rng.choice([0.5, 1.0])) if spoken else 0.0,
        in_thirds=bool(thirds),
        room=(float(rng.uniform(0.2, 1.2)), float(rng.uniform(-12, 0))) if room else None,
        over_phone=bool(phone),
    )


def vary_manner(manner: Manner, rng: np.random.Generator) -> Manner:
    """The manner with a share of drift, slides, falls, humming and another body."""
    drifts, slides, body, hums = rng.random(4) < (0.4, 0.5, 0.5, 0.05)
    return replace(
        manner,
        formant=manner.formant * float(np.exp(rng.normal(0, 0.1))) if body else manner.formant,
        consonants=float(np.exp(rng.uniform(-0.5, 0.5))) if body else 1.0,
        trend_semitones=float(rng.uniform(-0.5, 0.5)) if drifts else 0.0,
        slides=float(rng.uniform(0.2, 0.9)) if slides else 0.0,
        falls=float(rng.uniform(0.0, 0.6)) if slides else 0.0,
        hum=str(rng.choice(["vowel", "nasal"])) if hums else "",
    )


def split_phrases(notes: tuple[Note, ...]) -> list[range]:
    """Indices of the notes between two rests."""
    firsts = [
        index
        for index, note in enumerate(notes)
        if index == 0 or note.start - notes[index - 1].end > PHRASE_GAP
    ]
    return [range(first, end) for first, end in zip(firsts, [*firsts[1:], len(notes)], strict=True)]


def speak_phrases(
    notes: tuple[Note, ...], share: float, lowest: int, rng: np.random.Generator
) -> tuple[tuple[Note, ...], frozenset[int]]:
    """Some phrases on the pitches of speech, about a fourth above the lowest; also their notes' indices.

    A phrase falls by some semitones and wanders about that line.
    """
    spoken, result = set(), list(notes)
    for phrase in split_phrases(notes):
        if rng.random() >= share:
            continue
        line = lowest + 5 + np.linspace(2, -2, len(phrase)) + rng.normal(0, 1.2, len(phrase))
        for index, pitch in zip(phrase, line, strict=True):
            result[index] = replace(notes[index], pitch=int(round(pitch)))
        spoken.update(phrase)
    return tuple(result), frozenset(spoken)


def add_third(notes: tuple[Note, ...], key: str, rng: np.random.Generator) -> tuple[Note, ...]:
    """The melody a third higher in the scale of the key ("C:maj", "A:min"), not quite together with it."""
    root, _, mode = key.partition(":")
    scale = [(parse_root(root) + step) % 12 for step in SCALES["min" if mode.startswith("min") else "maj"]]
    second = []
    for note in notes:
        above = [pitch for pitch in range(note.pitch + 1, note.pitch + 6) if pitch % 12 in scale]
        third = above[1] if note.pitch % 12 in scale else above[0] if above[0] - note.pitch > 2 else above[1]
        late = float(np.clip(rng.normal(0, 0.015), -0.025, 0.025))
        start = max(0.0, note.start + late)
        second.append(replace(note, pitch=third, start=start, end=max(note.end + late, start + 0.05)))
    return tuple(second)


def call_by_phone(wave: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The wave [samples] through a telephone's microphone: its band, overdriven, with noise."""
    from scipy.signal import butter, sosfilt

    band = [rng.uniform(*edge) for edge in TELEPHONE_HZ]
    narrow = sosfilt(butter(3, band, "bandpass", fs=SAMPLE_RATE_HZ, output="sos"), wave)
    sounding = np.abs(narrow[np.abs(narrow) > 1e-4 * np.abs(narrow).max()])
    if not sounding.size:
        return wave
    ceiling = float(np.quantile(sounding, rng.uniform(0.93, 0.999)))
    noise = rng.standard_normal(len(wave)) * ceiling * 10 ** (rng.uniform(-50, -30) / 20)
    return (np.clip(narrow, -ceiling, ceiling) + noise).astype(np.float32)
