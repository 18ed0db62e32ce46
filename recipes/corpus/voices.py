"""The singers: who speaks for them, how high they sing and in which splits they appear."""

from dataclasses import dataclass, field

from duotok.tokenizer.common.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A singer made from a speaking voice."""

    name: str
    engine: str  # "kokoro", "espeak" or "sinsy"
    speaker: dict[str, float] = field(default_factory=dict)  # kokoro: voice -> weight; espeak: one name
    languages: tuple[str, ...] = ("en-us",)
    formant: float = 1.0  # shift of the spectral envelope; > 1 = smaller vocal tract
    lowest: int = 55  # comfortable range, MIDI pitch
    highest: int = 76
    held_out: bool = False  # sings only in validation and test

    @property
    def center(self) -> float:
        """Middle of the comfortable range, MIDI pitch."""
        return (self.lowest + self.highest) / 2


KOKORO_LANGUAGES = ("en-us", "ja", "es", "it", "fr-fr")
VOICES = (
    Voice(name="alpha", engine="kokoro", speaker={"jf_alpha": 1.0}, languages=KOKORO_LANGUAGES),
    Voice(name="gongitsune", engine="kokoro", speaker={"jf_gongitsune": 1.0}, languages=KOKORO_LANGUAGES),
    Voice(
        name="nezumi",
        engine="kokoro",
        speaker={"jf_nezumi": 1.0},
        languages=KOKORO_LANGUAGES,
        lowest=57,
        highest=79,
    ),
    Voice(
        name="tebukuro",
        engine="kokoro",
        speaker={"jf_tebukuro": 1.0},
        languages=KOKORO_LANGUAGES,
        lowest=53,
        highest=74,
    ),
    Voice(
        name="kumo",
        engine="kokoro",
        speaker={"jm_kumo": 1.0},
        languages=KOKORO_LANGUAGES,
        lowest=46,
        highest=67,
    ),
    Voice(
        name="baritone",
        engine="kokoro",
        speaker={"jm_kumo": 1.25, "jf_tebukuro": -0.25},
        languages=KOKORO_LANGUAGES,
        formant=0.9,
        lowest=42,
        highest=62,
    ),
    Voice(
        name="tenor",
        engine="kokoro",
        speaker={"jm_kumo": 0.6, "jf_gongitsune": 0.4},
        languages=KOKORO_LANGUAGES,
        formant=0.95,
        lowest=48,
        highest=69,
    ),
    Voice(
        name="child",
        engine="kokoro",
        speaker={"jf_nezumi": 0.6, "jf_alpha": 0.4},
        languages=KOKORO_LANGUAGES,
        formant=1.14,
        lowest=59,
        highest=79,
        held_out=True,
    ),
    Voice(name="espeak_anna", engine="espeak", speaker={"en-us+f3": 1.0}, lowest=54, highest=75),
    Voice(
        name="espeak_marco", engine="espeak", speaker={"it+m3": 1.0}, languages=("it",), lowest=45, highest=66
    ),
    Voice(name="espeak_luz", engine="espeak", speaker={"es+f4": 1.0}, languages=("es",)),
    Voice(
        name="espeak_hans",
        engine="espeak",
        speaker={"de+m7": 1.0},
        languages=("de",),
        lowest=43,
        highest=64,
        held_out=True,
    ),
)


def find_voice(name: str) -> Voice:
    """The voice of that name."""
    for voice in VOICES:
        if voice.name == name:
            return voice
    raise DataError(f"unknown voice {name!r}; choose from {', '.join(voice.name for voice in VOICES)}")


def voices_of_split(split: str, voices: tuple[Voice, ...] = VOICES) -> list[Voice]:
    """The voices that may sing in a split: the held-out ones only in validation and test."""
    return [voice for voice in voices if split != "train" or not voice.held_out]
