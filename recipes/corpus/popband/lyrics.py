"""Real lyrics: the syllables that a score writes under its notes, as a voice bank can sing them.

Words are transcribed by espeak-ng's rules of their language and cut into syllables; each is sung by the
syllable of the bank that sounds most like it. An item's notes carry what is heard, the bank's syllables.
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import zip_longest

from duotok.recipes.corpus.popband.voicebank import CONTINUATIONS, VOWELS, split_syllables
from duotok.recipes.corpus.popband.voices import Sound, transcribe
from duotok.recipes.corpus.scores.song import Note

MELISMA = "-"
# Scores' languages as espeak-ng calls them; the others are read as Italian, which says what is written.
ESPEAK_LANGUAGES = {"en": "en-us", "de": "de", "fr": "fr-fr", "es": "es", "it": "it", "nl": "nl", "la": "la"}
LETTERS = re.compile(r"[^\W\d_]+")
LONGEST_WORD = 40  # letters; no word is longer
KOKORO_LETTERS = str.maketrans(
    {
        "A": "eɪ",
        "I": "aɪ",
        "O": "oʊ",
        "W": "aʊ",
        "Y": "ɔɪ",
        "Q": "oʊ",
        "ʤ": "dʒ",
        "ʧ": "tʃ",
        "T": "ɾ",
        "g": "ɡ",
    }
)
# How open a vowel is and how far back, 0..1.
VOWEL_PLACES = {
    "i": (0, 0), "y": (0, 0.3), "ɨ": (0, 0.5), "ɯ": (0, 1), "u": (0, 1), "ɪ": (0.15, 0.1), "ʏ": (0.15, 0.3),
    "ᵻ": (0.15, 0.4), "ʊ": (0.15, 0.9), "e": (0.3, 0), "ø": (0.3, 0.3), "ɵ": (0.3, 0.5), "o": (0.3, 1),
    "ə": (0.5, 0.5), "ɚ": (0.5, 0.5), "ɛ": (0.6, 0), "œ": (0.6, 0.3), "ɜ": (0.6, 0.5), "ɝ": (0.6, 0.5),
    "ʌ": (0.6, 0.8), "ɔ": (0.6, 1), "ɐ": (0.8, 0.5), "æ": (0.85, 0), "a": (1, 0.4), "ɑ": (1, 1),
    "ɒ": (0.9, 1),
}  # fmt: skip
LIKE = ("pb", "td", "kɡ", "fvβw", "szθðɕʑ", "ʃʒ", "mnŋɲɱ", "lɫʎ", "rɹɾʁʀ", "hxçɦ", "jʝ")  # consonants


def transcribe_lyrics(notes: Sequence[Note], language: str) -> list[str]:
    """Each note's syllable in IPA, MELISMA where the one before is held on, "" where there are no words."""
    voice = ESPEAK_LANGUAGES.get(language, "it")
    result = [MELISMA if note.text == MELISMA else "" for note in notes]
    word: list[int] = []  # indices of its notes so far
    for index, note in enumerate(notes):
        if not note.text or note.text == MELISMA:
            continue
        word.append(index)
        if note.text.endswith("-") and any(later.text.strip("-") for later in notes[index + 1 :]):
            continue
        parts = ["".join(LETTERS.findall(notes[each].text))[:LONGEST_WORD].lower() for each in word]
        syllables = cut_syllables(transcribe("".join(parts), voice)) if any(parts) else []
        if len(syllables) != len(parts):
            syllables = ["".join(cut_syllables(transcribe(part, voice))) if part else "" for part in parts]
        for each, syllable in zip(word, syllables, strict=True):
            result[each] = syllable
        word = []
    return result


def cut_syllables(ipa: str) -> list[str]:
    """The syllables of a transcribed word."""
    sounds = (Sound(word=0, symbol=symbol, start=n, end=n + 1) for n, symbol in enumerate(ipa))
    return [syllable.text for syllable in split_syllables(tuple(sounds), 0, 0.0)]


def find_nearest(texts: tuple[str, ...], ipa: str) -> int:
    """The index of the text (IPA) that sounds most like `ipa`; the vowel counts most."""
    return min(range(len(texts)), key=lambda index: _distance(texts[index], ipa))


@lru_cache(maxsize=100_000)
def _distance(text: str, other: str) -> float:
    (onset, nucleus, coda), (onset2, nucleus2, coda2) = _parts(text), _parts(other)
    return (
        3 * _vowel_distance(nucleus[:1], nucleus2[:1])
        + 1.5 * _vowel_distance(nucleus[-1:], nucleus2[-1:])
        + _consonant_distance(onset[::-1], onset2[::-1])  # those next to the vowel are compared first
        + 0.7 * _consonant_distance(coda, coda2)
    )


@lru_cache(maxsize=100_000)
def _parts(text: str) -> tuple[str, str, str]:
    """Consonants, vowels, consonants."""
    plain = "".join(letter for letter in text.translate(KOKORO_LETTERS) if letter not in CONTINUATIONS)
    first = next((n for n, letter in enumerate(plain) if letter in VOWELS), len(plain))
    last = next((n for n in range(first, len(plain)) if plain[n] not in VOWELS), len(plain))
    return plain[:first], plain[first:last], plain[last:]


def _vowel_distance(one: str, other: str) -> float:
    place, place2 = (VOWEL_PLACES.get(vowel, (0.5, 0.5)) for vowel in (one, other))
    return abs(place[0] - place2[0]) + abs(place[1] - place2[1])


def _consonant_distance(one: str, other: str) -> float:
    total = 0.0
    for left, right in zip_longest(one, other):
        if left is None or right is None:
            total += 0.8
        elif left != right:
            total += 0.4 if any(left in group and right in group for group in LIKE) else 1.0
    return total
