"""The voice bank: spoken phrases of a voice analysed once by WORLD and cached, ready to be sung."""

import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from duotok.recipes.corpus.popband.voices import Sound, Speech, Voice, speak, write_phrases
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import whole_file

FRAME_SECONDS = 0.005
FFT_SIZE = 2048  # of the synthesis at 48 kHz
BINS = FFT_SIZE // 2 + 1
BANDS = 128  # points of the stored spectral envelope, evenly spaced on the mel scale
VOICE_BANDS = slice(4, 80)  # points from about 100 to 3000 Hz
NOISE_BANDS = 8  # points of the stored aperiodicity, evenly spaced in frequency
SHORTEST_VOWEL = 0.035  # seconds; a syllable with less clear voice is not used
QUIET = 2.5  # natural log of power below the loudest frame of a syllable where its vowel ends
SILENCE = 1e-12  # least power of the spectral envelope
FORMAT = 2
VOWELS = set("aeiouyæɑɐɒɔəɚɛɜɝɪʊʌᵻøœɵɯɨʏAIOWYQ")
CONTINUATIONS = set("ː̃ʲʰ˞̩̯")


@dataclass(frozen=True, kw_only=True)
class Syllable:
    """Times of a syllable in the bank (seconds from its start) and its sounds."""

    phrase: int
    onset: float  # start of the consonants before the vowel
    vowel_start: float
    vowel_end: float
    coda: float  # end of the consonants after the vowel
    text: str


@dataclass(frozen=True, kw_only=True)
class VoiceBank:
    """All analysed phrases of a voice, one after the other, 5 ms per frame."""

    rate_hz: int
    envelope: np.ndarray  # float16 [frames, BANDS], natural log of power
    noise: np.ndarray  # float16 [frames, NOISE_BANDS], aperiodicity 0..1
    voiced: np.ndarray  # bool [frames]
    syllables: tuple[Syllable, ...]

    @property
    def phrases(self) -> list[list[int]]:
        """Indices of the syllables of each phrase."""
        groups: dict[int, list[int]] = {}
        for index, syllable in enumerate(self.syllables):
            groups.setdefault(syllable.phrase, []).append(index)
        return list(groups.values())


def mel_points(rate_hz: int) -> np.ndarray:
    """Frequencies in Hz of the BANDS points from 0 to half the rate."""
    highest = 2595 * np.log10(1 + rate_hz / 2 / 700)
    return 700 * (10 ** (np.linspace(0, highest, BANDS) / 2595) - 1)


def expand_envelope(rate_hz: int, formant: float) -> np.ndarray:
    """Matrix [BANDS + 1, BINS] from stored points (and a constant 1) to FFT bins at 48 kHz.

    Formants are moved by the factor; above the bank's own range the envelope falls by 12 dB per octave.
    """
    frequency = np.arange(BINS) * SAMPLE_RATE_HZ / FFT_SIZE / formant
    # The last points before half the rate are the anti-aliasing filter of the speech, not the voice.
    highest = 0.94 * rate_hz / 2
    matrix = _interpolation(mel_points(rate_hz), np.minimum(frequency, highest))
    fall = -12 * np.log(10) / 10 * np.log2(np.maximum(frequency, highest) / highest)
    return np.vstack([matrix, fall[None]]).astype(np.float32)


def expand_noise(rate_hz: int) -> np.ndarray:
    """Matrix [NOISE_BANDS, BINS] from stored aperiodicity points to FFT bins at 48 kHz."""
    frequency = np.arange(BINS) * SAMPLE_RATE_HZ / FFT_SIZE
    return _interpolation(np.linspace(0, rate_hz / 2, NOISE_BANDS), frequency)


def _interpolation(points: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    wanted = np.clip(wanted, points[0], points[-1])
    right = np.clip(np.searchsorted(points, wanted), 1, len(points) - 1)
    weight = (wanted - points[right - 1]) / (points[right] - points[right - 1])
    matrix = np.zeros((len(points), len(wanted)), dtype=np.float32)
    columns = np.arange(len(wanted))
    matrix[right - 1, columns] = 1 - weight
    matrix[right, columns] = weight
    return matrix


def split_syllables(sounds: tuple[Sound, ...], phrase: int, shift: float) -> list[Syllable]:
    """Syllables of a phrase, word by word; consonants between two vowels of a word go to the second."""
    syllables = []
    for word in sorted({sound.word for sound in sounds}):
        word_sounds = [sound for sound in sounds if sound.word == word]
        nuclei: list[list[int]] = []  # first and last sound of each vowel group
        for index, sound in enumerate(word_sounds):
            vowel = sound.symbol[0] in VOWELS or sound.symbol[0] in CONTINUATIONS
            if vowel and nuclei and nuclei[-1][1] == index - 1:
                nuclei[-1][1] = index
            elif vowel:
                nuclei.append([index, index])
        if not nuclei:
            continue
        starts = [0]
        for left, right in zip(nuclei, nuclei[1:], strict=False):
            between = right[0] - left[1] - 1
            starts.append(left[1] + 1 + between // 2)
        ends = [*starts[1:], len(word_sounds)]
        for (first, last), start, end in zip(nuclei, starts, ends, strict=True):
            syllables.append(
                Syllable(
                    phrase=phrase,
                    onset=shift + word_sounds[start].start,
                    vowel_start=shift + word_sounds[first].start,
                    vowel_end=shift + word_sounds[last].end,
                    coda=shift + word_sounds[end - 1].end,
                    text="".join(sound.symbol for sound in word_sounds[start:end]),
                )
            )
    return syllables


def trim_vowels(syllables: list[Syllable], voiced: np.ndarray, level: np.ndarray) -> list[Syllable]:
    """The syllables with their vowel cut to its clearly voiced part; those without one are left out.

    voiced: bool per frame; level: natural log of the power of the voice's band per frame.
    """
    trimmed = []
    for syllable in syllables:
        first, last = (round(time / FRAME_SECONDS) for time in (syllable.vowel_start, syllable.vowel_end))
        last = min(last, len(voiced))
        if last - first < 3 or not voiced[first:last].any():
            continue
        inside = np.where(voiced[first:last], level[first:last], -np.inf)
        center = int(inside.argmax())
        clear = inside > inside[center] - QUIET
        left, right = center, center + 1
        while left > 0 and clear[left - 1]:
            left -= 1
        while right < len(clear) and clear[right]:
            right += 1
        if (right - left) * FRAME_SECONDS >= SHORTEST_VOWEL:
            start, end = (first + left) * FRAME_SECONDS, (first + right) * FRAME_SECONDS
            trimmed.append(replace(syllable, vowel_start=start, vowel_end=end))
    return trimmed


def analyse(speech: Speech) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """WORLD analysis (Morise et al. 2016): envelope and noise points and voicing of each frame."""
    # A compiled module without stubs.
    from pyworld import cheaptrick, d4c, harvest  # pyright: ignore[reportAttributeAccessIssue, reportMissingImports]

    wave, rate = speech.wave, speech.rate_hz
    period = FRAME_SECONDS * 1000
    pitch, times = harvest(wave, rate, f0_floor=60, f0_ceil=500, frame_period=period)
    if not (pitch > 0).any():
        raise DataError("a spoken phrase has no voiced sound")
    envelope = cheaptrick(wave, pitch, times, rate)
    noise = d4c(wave, pitch, times, rate, threshold=0.0)
    noise[pitch == 0] = 1.0
    fft_size = (envelope.shape[1] - 1) * 2
    to_points = _interpolation(np.arange(fft_size // 2 + 1) * rate / fft_size, mel_points(rate))
    to_noise = _interpolation(np.linspace(0, 1, noise.shape[1]), np.linspace(0, 1, NOISE_BANDS))
    points = np.log(np.maximum(envelope, SILENCE)) @ to_points
    return points.astype(np.float16), (noise @ to_noise).astype(np.float16), pitch > 0


def build_bank(voice: Voice, phrases: int) -> VoiceBank:
    """Speak and analyse `phrases` phrases; the same voice always gets the same words."""
    rng = np.random.default_rng(zlib.crc32(voice.name.encode()))
    envelopes, noises, voicing, syllables = [], [], [], []
    frames, rate_hz = 0, 0
    for number in range(phrases):
        language = voice.languages[number % len(voice.languages)]
        words = write_phrases(language, 1, rng)[0]
        speech = speak(voice, words, language)
        found = split_syllables(speech.sounds, number, frames * FRAME_SECONDS)
        if not found:
            continue
        points, noise, voiced = analyse(speech)
        envelopes.append(points)
        noises.append(noise)
        voicing.append(voiced)
        syllables += found
        rate_hz = speech.rate_hz
        frames += len(points)
    if not syllables:
        raise DataError(f"the voice {voice.name} has not spoken a single syllable")
    envelope, voiced = np.concatenate(envelopes), np.concatenate(voicing)
    level = np.log(np.exp(envelope[:, VOICE_BANDS].astype(np.float32)).mean(axis=1))
    return VoiceBank(
        rate_hz=rate_hz,
        envelope=envelope,
        noise=np.concatenate(noises),
        voiced=voiced,
        syllables=tuple(trim_vowels(syllables, voiced, level)),
    )


def bank_path(folder: Path, voice: Voice, phrases: int) -> Path:
    """Where the bank of a voice is cached."""
    return folder / f"{voice.name}-{phrases}-{FORMAT}.npz"


def save_bank(path: Path, bank: VoiceBank) -> None:
    """Write the bank as a whole file."""
    times = [(s.onset, s.vowel_start, s.vowel_end, s.coda) for s in bank.syllables]
    with whole_file(path) as temporary, temporary.open("wb") as file:
        np.savez(
            file,
            rate_hz=bank.rate_hz,
            envelope=bank.envelope,
            noise=bank.noise,
            voiced=bank.voiced,
            phrase=np.array([s.phrase for s in bank.syllables]),
            times=np.array(times),
            texts=np.array([s.text for s in bank.syllables]),
        )


def load_bank(path: Path) -> VoiceBank:
    """Read a cached bank."""
    try:
        with np.load(path, allow_pickle=False) as data:
            syllables = tuple(
                Syllable(phrase=n, onset=onset, vowel_start=start, vowel_end=end, coda=coda, text=text)
                for n, (onset, start, end, coda), text in zip(
                    *(data[name].tolist() for name in ("phrase", "times", "texts")), strict=True
                )
            )
            return VoiceBank(
                rate_hz=int(data["rate_hz"]),
                envelope=data["envelope"],
                noise=data["noise"],
                voiced=data["voiced"],
                syllables=syllables,
            )
    except (OSError, KeyError, ValueError) as error:
        raise DataError(f"the voice bank {path} is broken ({error}); delete it and run again") from error
