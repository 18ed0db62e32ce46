"""Sings a melody with a voice bank: score times, pitch with glides and vibrato, source-filter synthesis.

`synthesize` computes what WORLD's own synthesizer does (Morise et al. 2016, section 3), frame by frame
instead of pulse by pulse, in single precision and at 48 kHz: several times faster, and silence costs nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from duotok.recipes.corpus.popband.lyrics import MELISMA, find_nearest
from duotok.recipes.corpus.popband.voicebank import (
    FFT_SIZE,
    FRAME_SECONDS,
    NOISE_BANDS,
    SILENCE,
    VOICE_BANDS,
    VOWELS,
    Syllable,
    VoiceBank,
    expand_envelope,
    expand_noise,
    mel_points,
)
from duotok.recipes.corpus.scores.song import Note
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

HOP_SAMPLES = round(FRAME_SECONDS * SAMPLE_RATE_HZ)
WINDOW_SAMPLES = 2 * HOP_SAMPLES
BATCH_FRAMES = 256
PULSE_TAPS = 16
RATE = 1 / FRAME_SECONDS  # frames per second
LONGEST_ONSET, LONGEST_CODA = 0.16, 0.14  # seconds of consonants
PHRASE_GAP = 0.3  # a longer rest starts a new phrase


def make_pulses(pitch_hz: np.ndarray, voiced: np.ndarray, samples: int) -> np.ndarray:
    """Band-limited pulse train of unit power [samples]; pitch and voicing are per 5 ms frame."""
    times = np.arange(samples) / HOP_SAMPLES
    frequency = np.interp(times, np.arange(len(pitch_hz)), pitch_hz)
    phase = np.cumsum(frequency / SAMPLE_RATE_HZ)
    turns = np.floor(phase)
    at = np.flatnonzero(np.diff(turns) > 0)  # the pulse falls between at and at + 1
    fraction = (turns[at + 1] - phase[at]) / (phase[at + 1] - phase[at])
    sounding = voiced[np.minimum((at / HOP_SAMPLES + 0.5).astype(int), len(voiced) - 1)]
    at, fraction = at[sounding], fraction[sounding]
    heights = np.sqrt(SAMPLE_RATE_HZ / frequency[at])
    taps = np.arange(PULSE_TAPS) - PULSE_TAPS // 2 + 1
    offset = taps[None] - fraction[:, None]
    shapes = np.sinc(offset) * np.square(np.cos(np.pi * offset / (PULSE_TAPS + 2))) * heights[:, None]
    places = at[:, None] + taps[None]
    inside = (places >= 0) & (places < samples)
    train = np.bincount(places[inside], weights=shapes[inside], minlength=samples)
    # A train of pulses has a mean value; no voice has.
    train -= np.sqrt(frequency / SAMPLE_RATE_HZ) * np.repeat(voiced, HOP_SAMPLES)[:samples]
    return train.astype(np.float32)


def synthesize(
    log_power: np.ndarray,
    aperiodicity: np.ndarray,
    pitch_hz: np.ndarray,
    voiced: np.ndarray,
    active: np.ndarray,
    expand_power: np.ndarray,
    expand_aperiodicity: np.ndarray,
    rng: np.random.Generator,
) -> np.ndarray:
    """Sound at 48 kHz [frames * 240] of envelopes given every 5 ms.

    log_power: [frames, bands] natural log; aperiodicity: [frames, noise_bands], 0..1; the two matrices
    (bands -> BINS) spread them over the FFT bins. pitch_hz, voiced: [frames]. Only frames where `active`
    is set sound.
    """
    frames = len(log_power)
    samples = frames * HOP_SAMPLES
    margin = WINDOW_SAMPLES
    pulses = np.zeros(samples + 2 * margin, dtype=np.float32)
    pulses[margin : margin + samples] = make_pulses(pitch_hz, voiced, samples)
    noise = rng.standard_normal(len(pulses), dtype=np.float32)
    window = np.hanning(WINDOW_SAMPLES + 1)[:-1].astype(np.float32)
    output = np.zeros(samples + FFT_SIZE + 2 * margin, dtype=np.float32)
    # Cepstrum of a minimum-phase filter: the part of negative time folded onto the positive one.
    fold = np.zeros(FFT_SIZE, dtype=np.float32)
    fold[0] = fold[FFT_SIZE // 2] = 0.5
    fold[1 : FFT_SIZE // 2] = 1.0
    span = np.arange(WINDOW_SAMPLES)
    chosen = np.flatnonzero(active)
    for first in range(0, len(chosen), BATCH_FRAMES):
        batch = chosen[first : first + BATCH_FRAMES]
        starts = margin + batch * HOP_SAMPLES - HOP_SAMPLES  # the window is centered on the frame
        pieces = starts[:, None] + span[None]
        periodic = np.fft.rfft(pulses[pieces] * window, FFT_SIZE)
        random = np.fft.rfft(noise[pieces] * window, FFT_SIZE)
        share = np.clip(aperiodicity[batch].astype(np.float32) @ expand_aperiodicity, 0.001, 1.0)
        log_spectrum = log_power[batch].astype(np.float32) @ expand_power
        cepstrum = np.fft.irfft(log_spectrum, FFT_SIZE)
        transfer = np.exp(np.fft.rfft(cepstrum * fold, FFT_SIZE))  # exp(log power / 2) and its phase
        transfer *= np.sqrt(1 - np.square(share)) * periodic + share * random
        sound = np.fft.irfft(transfer, FFT_SIZE)
        for start, piece in zip(starts, sound, strict=True):
            output[start : start + FFT_SIZE] += piece
    return output[margin : margin + samples]


@dataclass(frozen=True, kw_only=True)
class Manner:
    """How one item is sung."""

    formant: float = 1.0
    vibrato_semitones: float = 0.25  # peak
    vibrato_hz: float = 5.5
    vibrato_delay: float = 0.3  # seconds after the start of a note
    drift_semitones: float = 0.08
    glide_hz: float = 9.0  # of the pitch from note to note
    scoop: float = 0.2  # chance to reach the first note of a phrase from below
    melisma: float = 0.1  # chance that a note continues the syllable before it
    breathiness: float = 0.0  # 0..1, noise added to the voiced sounds
    clarity: float = 1.5  # power of the aperiodicity: higher = clearer than the speaking voice
    dynamics: float = 0.5  # strength of swells in natural-log power
    breaths: float = 0.5  # chance of a breath before a phrase
    consonants: float = 1.0  # their length, as a factor
    trend_semitones: float = 0.0  # from the middle of the item to its end the pitch drifts so far
    slides: float = 0.0  # chance to reach a note slowly from the one before
    falls: float = 0.0  # chance to let the pitch fall at the end of a phrase
    hum: str = ""  # "vowel" or "nasal": one sound in place of all syllables


def draw_manner(rng: np.random.Generator, formant: float) -> Manner:
    """A random manner around the voice's own formant factor."""
    return Manner(
        formant=formant * float(np.exp(rng.normal(0, 0.04))),
        vibrato_semitones=float(rng.uniform(0.05, 0.4)),
        vibrato_hz=float(rng.uniform(4.8, 6.2)),
        vibrato_delay=float(rng.uniform(0.15, 0.4)),
        drift_semitones=float(rng.uniform(0.04, 0.12)),
        glide_hz=float(rng.uniform(7.0, 14.0)),
        scoop=float(rng.uniform(0.0, 0.4)),
        melisma=float(rng.uniform(0.0, 0.3)),
        breathiness=float(np.clip(rng.normal(0.0, 0.15), 0.0, 0.4)),
        clarity=float(rng.uniform(1.3, 2.6)),
        dynamics=float(rng.uniform(0.2, 0.9)),
        breaths=float(rng.uniform(0.0, 0.8)),
    )


@dataclass(kw_only=True)
class SungSyllable:
    """A syllable of the bank at its place in the song: the vowel begins at start."""

    start: float
    end: float
    syllable: Syllable
    first: bool  # of its phrase
    last: bool = False  # of its phrase


def assign_lyrics(
    notes: tuple[Note, ...],
    bank: VoiceBank,
    manner: Manner,
    rng: np.random.Generator,
    words: Sequence[str] = (),
) -> tuple[list[SungSyllable], list[str]]:
    """Give every note a syllable of the bank or a melisma; also the text of each note.

    words: what each note should sound like, as `transcribe_lyrics` gives it; a note without is given any
    syllable.
    """
    phrases, known = bank.phrases, tuple(syllable.text for syllable in bank.syllables)
    sung: list[SungSyllable] = []
    texts: list[str] = []
    supply: list[int] = []
    breath_after = int(rng.integers(9, 16))
    in_phrase = 0
    for index, note in enumerate(notes):
        previous = notes[index - 1] if index else None
        gap = note.start - previous.end if previous else np.inf
        starts_phrase = gap > PHRASE_GAP or (in_phrase >= breath_after and gap > 0.08)
        joined = not starts_phrase and gap < 0.09
        word = words[index] if words else ""
        if word:
            is_held = joined and word == MELISMA
        else:
            is_held = joined and previous and note.pitch != previous.pitch and rng.random() < manner.melisma
        if is_held:
            sung[-1].end = note.end
            texts.append(MELISMA)
            continue
        if starts_phrase:
            if sung:
                sung[-1].last = True
            in_phrase = 0
            breath_after = int(rng.integers(9, 16))
        if word and word != MELISMA:
            syllable = bank.syllables[find_nearest(known, word)]
        else:
            if not supply or starts_phrase:
                supply = list(phrases[rng.integers(len(phrases))])
            syllable = bank.syllables[supply.pop(0)]
        sung.append(SungSyllable(start=note.start, end=note.end, syllable=syllable, first=starts_phrase))
        texts.append(syllable.text)
        in_phrase += 1
    if sung:
        sung[-1].last = True
    return sung, texts


def hum(
    sung: list[SungSyllable], texts: list[str], bank: VoiceBank, manner: Manner, rng: np.random.Generator
) -> tuple[list[SungSyllable], list[str]]:
    """One vowel of the bank in place of every syllable; its text is the vowel, or "m"."""
    chosen = bank.syllables[rng.integers(len(bank.syllables))]
    vowel = "".join(letter for letter in chosen.text if letter in VOWELS) or "a"
    text = "m" if manner.hum == "nasal" else vowel
    alone = replace(chosen, onset=chosen.vowel_start, coda=chosen.vowel_end, text=text)
    return [replace(event, syllable=alone) for event in sung], [t if t == MELISMA else text for t in texts]


def map_time(
    sung: list[SungSyllable], frames: int, consonants: float = 1.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each frame of the song the bank time in frames (-1 = silence), the number of its syllable and
    whether it lies inside the vowel."""
    source = np.full(frames, -1.0)
    owner = np.full(frames, -1)
    vowel = np.zeros(frames, dtype=bool)
    for index, event in enumerate(sung):
        s = event.syllable
        following = sung[index + 1] if index + 1 < len(sung) else None
        onset = min(s.vowel_start - s.onset, LONGEST_ONSET) * consonants
        if index and not event.first:  # fast notes have short consonants
            onset = min(onset, 0.4 * (event.start - sung[index - 1].start))
        duration = max(event.end - event.start, 0.08)
        coda = min(s.coda - s.vowel_end, LONGEST_CODA, 0.3 * duration)
        limit = event.start + duration
        if following is not None and following.start - limit < 0.12:
            later = following.syllable
            next_onset = min(later.vowel_start - later.onset, LONGEST_ONSET) * consonants
            limit = following.start - min(next_onset, 0.4 * (following.start - event.start))
        vowel_end = max(event.start + 0.05, limit - coda)
        length = s.vowel_end - s.vowel_start
        edge = min(0.06, 0.3 * length, 0.3 * (vowel_end - event.start))
        places = [event.start - onset, event.start, event.start + edge]
        times = [s.vowel_start - min(s.vowel_start - s.onset, 0.2), s.vowel_start, s.vowel_start + edge]
        if vowel_end - event.start > length:  # hold the first part of the vowel, then its end
            places.append(event.start + edge + 0.75 * (vowel_end - event.start - 2 * edge))
            times.append(s.vowel_start + edge + 0.5 * (length - 2 * edge))
        places += [vowel_end - edge, vowel_end, vowel_end + max(coda, 0.005)]
        times += [s.vowel_end - edge, s.vowel_end, s.vowel_end + min(s.coda - s.vowel_end, 0.18)]
        first, last = max(0, int(places[0] * RATE)), min(frames, int(places[-1] * RATE) + 1)
        own = np.arange(first, last)
        source[own] = np.interp(own / RATE, places, times) * RATE
        owner[own] = index
        vowel[own] = (own / RATE > event.start + 0.02) & (own / RATE < vowel_end - 0.015)
    return source, owner, vowel


def pitch_curve(
    notes: tuple[Note, ...], sung: list[SungSyllable], frames: int, manner: Manner, rng: np.random.Generator
) -> np.ndarray:
    """Sung pitch of every frame in MIDI semitones, also through rests and consonants."""
    from scipy.signal import lfilter

    target = np.zeros(frames)
    age = np.zeros(frames)
    # The filter below is late by this time: the glide is then centered on the start of the note.
    lead = 1.6 / (2 * np.pi * manner.glide_hz) + 0.01
    starts = [max(0, int((note.start - lead) * RATE)) for note in notes]
    for note, start, end in zip(notes, starts, [*starts[1:], frames], strict=True):
        target[start:end] = note.pitch
        age[start:end] = np.arange(end - start) / RATE
    target[: starts[0]] = notes[0].pitch
    for event in sung:  # scoops
        if event.first and rng.random() < manner.scoop:
            first = max(0, int((event.start - 0.15) * RATE))
            target[first : int((event.start + 0.02) * RATE)] -= rng.uniform(0.7, 2.0)
    # A critically damped glide of second order, slightly overshooting as singers do (damping 0.8).
    omega, damping = 2 * np.pi * manner.glide_hz * FRAME_SECONDS, 0.8
    denominator = [1 + 2 * damping * omega + omega**2, -(2 + 2 * damping * omega), 1.0]
    shift = target[0]
    smooth = lfilter([omega**2], denominator, target - shift) + shift
    rate = manner.vibrato_hz * (1 + 0.04 * _wander(frames, 0.4, rng))
    depth = manner.vibrato_semitones * np.clip((age - manner.vibrato_delay) / 0.4, 0, 1)
    vibrato = depth * np.sin(2 * np.pi * np.cumsum(rate) * FRAME_SECONDS)
    drift = manner.drift_semitones * _wander(frames, 0.3, rng) + 0.015 * _wander(frames, 0.03, rng)
    return smooth + vibrato + drift


def bend_pitch(
    pitch: np.ndarray,
    notes: tuple[Note, ...],
    manner: Manner,
    spoken: frozenset[int],
    rng: np.random.Generator,
) -> np.ndarray:
    """The pitch curve with drift, slides, falls, and syllables that are spoken (indices of notes)."""
    if manner.trend_semitones:
        line = np.linspace(-1, 1, len(pitch)) + 0.3 * _wander(len(pitch), 6.0, rng)
        pitch = pitch + manner.trend_semitones * line
    for index, note in enumerate(notes):
        gap = note.start - notes[index - 1].end if index else np.inf
        following = notes[index + 1].start if index + 1 < len(notes) else np.inf
        length = note.end - note.start
        if gap < 0.15 and rng.random() < manner.slides:
            last = note.start + min(rng.uniform(0.12, 0.4), 0.7 * length)
            own = slice(max(0, int((note.start - 0.06) * RATE)), int(last * RATE))
            turn = 0.5 - 0.5 * np.cos(np.linspace(0, np.pi, len(pitch[own])))
            if len(turn):
                pitch[own] = pitch[own][0] + turn * (pitch[own][-1] - pitch[own][0])
        if following - note.end > PHRASE_GAP and rng.random() < manner.falls:
            own = slice(int((note.end - min(0.2, 0.5 * length)) * RATE), int((note.end + 0.05) * RATE))
            pitch[own] -= rng.uniform(1, 5) * np.linspace(0, 1, len(pitch[own]))
        if index in spoken:
            own = slice(int(note.start * RATE), int(note.end * RATE))
            pitch[own] += rng.uniform(-5, 1) * np.linspace(-0.5, 0.5, len(pitch[own]))
    return pitch


def _wander(frames: int, seconds: float, rng: np.random.Generator) -> np.ndarray:
    """Smooth noise of unit variance that changes within the given time."""
    width = max(2, int(seconds * RATE))
    window = np.hanning(width + 2)
    noise = np.convolve(rng.normal(0, 1, frames + len(window)), window / np.sqrt((window**2).sum()), "same")
    return noise[:frames]


def sing(
    notes: tuple[Note, ...],
    bank: VoiceBank,
    manner: Manner,
    seconds: float,
    rng: np.random.Generator,
    spoken: frozenset[int] = frozenset(),
    words: Sequence[str] = (),
) -> tuple[np.ndarray, list[str]]:
    """The sung melody: float32 mono at 48 kHz (exactly `seconds` long) and the syllable of each note.

    spoken: indices of notes that are spoken in rhythm, about their pitch. words: see `assign_lyrics`.
    """
    notes = tuple(replace(note, end=min(note.end, seconds - 0.05)) for note in notes)
    frames = int(seconds * RATE) + 1
    sung, texts = assign_lyrics(notes, bank, manner, rng, words)
    bends = rng.spawn(1)[0]  # the other draws do not depend on it
    if manner.hum:
        sung, texts = hum(sung, texts, bank, manner, bends)
    source, owner, vowel = map_time(sung, frames, manner.consonants)
    active = source >= 0
    place = np.clip(source, 0, len(bank.envelope) - 2)
    left = place.astype(int)
    weight = (place - left)[:, None].astype(np.float32)
    envelope = (1 - weight) * bank.envelope[left] + weight * bank.envelope[left + 1]  # [frames, bands]
    noise = (1 - weight) * bank.noise[left] + weight * bank.noise[left + 1]
    voiced = (bank.voiced[left] | vowel) & active
    envelope += _dynamics(sung, owner, envelope, vowel, manner, rng)[:, None]
    noise = _clear_noise(noise, bank.voiced[left], voiced, vowel, manner)
    if manner.hum == "nasal":  # the mouth is closed: 12 dB per octave are lost above 400 Hz
        envelope -= 12 * np.log(10) / 10 * np.log2(np.maximum(mel_points(bank.rate_hz) / 400, 1))
    envelope[~active] = np.log(SILENCE)
    _add_breaths(sung, envelope, noise, vowel, manner, rng)
    pitch = bend_pitch(pitch_curve(notes, sung, frames, manner, rng), notes, manner, spoken, bends)
    pitch_hz = 440 * 2 ** ((pitch - 69) / 12)
    wave = synthesize(
        np.hstack([envelope, np.ones((frames, 1), dtype=envelope.dtype)]),
        noise,
        pitch_hz,
        voiced,
        envelope.max(axis=1) > np.log(SILENCE) + 1,
        expand_envelope(bank.rate_hz, manner.formant),
        expand_noise(bank.rate_hz),
        rng,
    )
    samples = round(seconds * SAMPLE_RATE_HZ)
    result = np.zeros(samples, dtype=np.float32)
    result[: min(samples, len(wave))] = wave[:samples]
    return result, texts


def _clear_noise(
    noise: np.ndarray, source_voiced: np.ndarray, voiced: np.ndarray, vowel: np.ndarray, manner: Manner
) -> np.ndarray:
    """Aperiodicity of the singing voice from that of the speech."""
    usual = np.median(noise[source_voiced & vowel], axis=0) if (source_voiced & vowel).any() else noise[0]
    # Vowels that the speech whispers get the usual noise of the voice.
    noise = np.where((vowel & ~source_voiced)[:, None], usual, noise) ** manner.clarity
    breath = manner.breathiness * np.clip(np.arange(NOISE_BANDS) / 3, 0, 1)  # none at the lowest partials
    return np.where(voiced[:, None], noise + breath * (1 - noise), 1.0)


def _dynamics(
    sung: list[SungSyllable],
    owner: np.ndarray,
    envelope: np.ndarray,
    vowel: np.ndarray,
    manner: Manner,
    rng: np.random.Generator,
) -> np.ndarray:
    """Natural log of the power gain per frame: even vowels, swells, soft ends of phrases."""
    from scipy.ndimage import gaussian_filter1d

    gain = np.zeros(len(owner))
    # Speech stresses some words; singing is more even: bring each vowel towards the common level.
    level = np.log(np.exp(envelope[:, VOICE_BANDS]).mean(axis=1) + SILENCE)
    common = float(np.median(level[vowel])) if vowel.any() else 0.0
    times = np.arange(len(owner)) / RATE
    for index, event in enumerate(sung):
        own = owner == index
        inside = own & vowel
        if inside.any():
            even = 0.7 * float(np.clip(common - level[inside].mean(), -3, 3))
            gain[own] += np.where(vowel[own], even, min(even, 0.0))  # consonants are never raised
        gain[own] += rng.normal(0, 0.25 * manner.dynamics)
        swell = np.clip((times[own] - event.start) / max(event.end - event.start, 0.1), 0, 1)
        gain[own] += manner.dynamics * 0.8 * np.sin(np.pi * swell)
        if event.last:
            gain[own] -= 3.0 * np.clip(1 - (event.end - times[own]) / 0.12, 0, 2)
    gain += manner.dynamics * _wander(len(gain), 3.0, rng)
    return gaussian_filter1d(gain, 3)


def _add_breaths(
    sung: list[SungSyllable],
    envelope: np.ndarray,
    noise: np.ndarray,
    vowel: np.ndarray,
    manner: Manner,
    rng: np.random.Generator,
) -> None:
    """Quiet noise in the shape of the voice's own average vowel before some phrases; changes in place."""
    if not vowel.any():
        return
    shape = envelope[vowel].mean(axis=0)
    tilt = np.linspace(-3.0, 2.0, envelope.shape[1])
    for index, event in enumerate(sung):
        before = sung[index - 1].end if index else 0.0
        if not event.first or event.start - before < 0.55 or rng.random() > manner.breaths:
            continue
        length = min(0.45, event.start - before - 0.3) * rng.uniform(0.6, 1.0)
        last = int((event.start - LONGEST_ONSET - 0.03) * RATE)
        first = max(0, last - int(length * RATE))
        if last - first < 10:
            continue
        rise = np.log(np.sin(np.pi * np.linspace(0.03, 0.97, last - first)) ** 2)
        envelope[first:last] = shape + tilt - rng.uniform(5.0, 7.5) + rise[:, None]
        noise[first:last] = 1.0
