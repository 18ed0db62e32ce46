"""How well an accompaniment fits a singer: harmony, in-key share and beat F-measure.

Signal processing only and independent of the models: librosa's chroma and beat tracker, mir_eval's F-measure.
All three are chance-like for the accompaniment of another song, which is measured next to them.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import librosa
import mir_eval
import numpy as np
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.harmony import estimate_key

FRAME_RATE_HZ = 20.0
_HOP_SAMPLES = round(SAMPLE_RATE_HZ / FRAME_RATE_HZ)
_FFT_SIZE = 8192
_BEAT_RATE_HZ = 24_000
_BEAT_HOP_SAMPLES = 512
_EDGE_SECONDS = 1.0  # beats this near to the borders of an excerpt are left out on both sides of a comparison
_SILENT_RMS = 1e-4  # -80 dBFS
_PITCH_RATE_HZ = 16_000
_LOWEST_PITCH_HZ, _HIGHEST_PITCH_HZ = 65.0, 1_050.0

Note = tuple[float, float, int, str]  # start and end in seconds, MIDI pitch, syllable


@dataclass(frozen=True, kw_only=True)
class Coherence:
    """The three figures of one pair of a singer and an accompaniment."""

    harmony: float  # share of chroma energy at the sung pitch class x 12; 1.0 = chance, 0.0 = silence
    in_key: float  # share of sung frames inside the accompaniment's key, 0 to 1; 0.0 = no key to be heard
    beat_f: float  # 0 to 1


@dataclass(frozen=True, kw_only=True)
class Singing:
    """What an accompaniment is measured against."""

    pitches: np.ndarray  # [frames] at FRAME_RATE_HZ, MIDI pitch, NaN where nothing is sung
    beats_seconds: np.ndarray  # [beats]


@dataclass(frozen=True, kw_only=True)
class Backing:
    """What can be heard in an accompaniment."""

    chroma: np.ndarray  # [frames, 12] at FRAME_RATE_HZ, energy
    beats_seconds: np.ndarray  # [beats]
    seconds: float


def listen_to(accompaniment: Tensor) -> Backing:
    """Chroma and beats of accompaniment [channels, samples] at 48 kHz."""
    return Backing(
        chroma=energy_chroma(accompaniment),
        beats_seconds=track_beats(accompaniment),
        seconds=accompaniment.shape[-1] / SAMPLE_RATE_HZ,
    )


def measure_coherence(singing: Singing, backing: Backing) -> Coherence:
    """The three figures of one pair."""
    return Coherence(
        harmony=measure_harmony(backing.chroma, singing.pitches),
        in_key=measure_in_key(backing.chroma, singing.pitches),
        beat_f=measure_beat_f(backing.beats_seconds, singing.beats_seconds, backing.seconds),
    )


def measure_harmony(chroma: np.ndarray, pitches: np.ndarray) -> float:
    """Mean over sung frames of the chroma energy's share at the sung pitch class, x 12 (1.0 = chance).

    chroma: [frames, 12] energies; pitches: [frames] MIDI, NaN where nothing is sung. Silent frames are 0.
    """
    chroma, classes = _sung_frames(chroma, pitches)
    if len(classes) == 0:
        return 0.0
    total = chroma.sum(axis=1)
    share = chroma[np.arange(len(classes)), classes] / np.maximum(total, 1e-12)
    return float(12 * np.where(total > 1e-9, share, 0.0).mean())


def measure_in_key(chroma: np.ndarray, pitches: np.ndarray) -> float:
    """Share of sung frames whose pitch class is in the key estimated from the accompaniment alone.

    The key (24 major and natural minor ones) is Krumhansl's, on the mean of the frames' chroma, each of them
    scaled to sum 1 so that loud passages do not decide alone. 0.0 where there is no key, as in silence.
    """
    total = chroma.sum(axis=1, keepdims=True)
    heard = chroma[total[:, 0] > 1e-9] / total[total[:, 0] > 1e-9]
    key = estimate_key(heard) if len(heard) else None
    _, classes = _sung_frames(chroma, pitches)
    if key is None or len(classes) == 0:
        return 0.0
    return float(np.isin(classes, sorted(key.scale)).mean())


def measure_beat_f(estimated: np.ndarray, reference: np.ndarray, seconds: float) -> float:
    """F-measure (mir_eval, +-70 ms) of beat times in seconds against the song's own; 0.0 without beats.

    Both lose the beats within 1 s of the excerpt's borders, where a tracker has heard too little.
    """
    estimated, reference = (
        np.sort(beats[(beats >= _EDGE_SECONDS) & (beats <= seconds - _EDGE_SECONDS)])
        for beats in (np.asarray(estimated, dtype=float), np.asarray(reference, dtype=float))
    )
    if len(estimated) == 0 or len(reference) == 0:
        return 0.0
    return float(mir_eval.beat.f_measure(reference, estimated))


def energy_chroma(wave: Tensor) -> np.ndarray:
    """Chroma energies [frames, 12] at 20 Hz, C first, of wave [channels, samples] at 48 kHz."""
    mono = wave.float().mean(dim=0).cpu().numpy()
    frames = frame_count(len(mono))
    if len(mono) == 0 or np.sqrt(np.mean(mono**2)) < _SILENT_RMS:
        return np.zeros((frames, 12))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # shorter than one window: librosa pads it
        chroma = librosa.feature.chroma_stft(
            y=mono, sr=SAMPLE_RATE_HZ, norm=None, tuning=0.0, n_fft=_FFT_SIZE, hop_length=_HOP_SAMPLES
        )
    return chroma.T[:frames].astype(np.float64)


def track_beats(wave: Tensor) -> np.ndarray:
    """Beat times in seconds [beats] that librosa hears in wave [channels, samples] at 48 kHz."""
    mono = wave.float().mean(dim=0).cpu().numpy()
    if len(mono) < SAMPLE_RATE_HZ or np.sqrt(np.mean(mono**2)) < _SILENT_RMS:
        return np.zeros(0)
    mono = librosa.resample(mono, orig_sr=SAMPLE_RATE_HZ, target_sr=_BEAT_RATE_HZ, res_type="soxr_hq")
    _, beats = librosa.beat.beat_track(
        y=mono, sr=_BEAT_RATE_HZ, hop_length=_BEAT_HOP_SAMPLES, units="time", trim=False
    )
    return np.asarray(beats, dtype=float)


def pitches_of_notes(notes: Sequence[Note], samples: int, start_seconds: float = 0.0) -> np.ndarray:
    """Pitch per frame [frames] of a manifest's notes in `samples` samples from start_seconds on."""
    pitches = np.full(frame_count(samples), np.nan)
    times = start_seconds + np.arange(len(pitches)) / FRAME_RATE_HZ
    for start, end, pitch, _ in notes:
        pitches[(times >= start) & (times < end)] = pitch
    return pitches


def pitches_of_wave(vocal: Tensor) -> np.ndarray:
    """Pitch per frame [frames] of a recorded voice [channels, samples] at 48 kHz by pYIN, NaN if unvoiced."""
    mono = vocal.float().mean(dim=0).cpu().numpy()
    frames = frame_count(len(mono))
    if np.sqrt(np.mean(mono**2)) < _SILENT_RMS:
        return np.full(frames, np.nan)
    mono = librosa.resample(mono, orig_sr=SAMPLE_RATE_HZ, target_sr=_PITCH_RATE_HZ, res_type="soxr_hq")
    hop = round(_PITCH_RATE_HZ / FRAME_RATE_HZ)
    low, high = _LOWEST_PITCH_HZ, _HIGHEST_PITCH_HZ
    pitch_hz, voiced, _ = librosa.pyin(mono, fmin=low, fmax=high, sr=_PITCH_RATE_HZ, hop_length=hop)
    pitches = np.full(frames, np.nan)
    usable = min(frames, len(pitch_hz))
    pitches[:usable] = np.where(voiced, librosa.hz_to_midi(pitch_hz), np.nan)[:usable]
    return pitches


def pair_with_others(songs: Sequence[str]) -> list[int]:
    """For every item the index of an item of another song, each used once: a fixed derangement.

    songs: the song of each item. Raises DataError when one song has more than half of the items.
    """
    order = sorted(range(len(songs)), key=lambda index: (songs[index], index))
    largest = max((songs.count(song) for song in set(songs)), default=0)
    if len(songs) < 2 or largest * 2 > len(songs):
        raise DataError(
            f"mismatched pairs need items of at least two songs and no song with more than half of the "
            f"{len(songs)} items; use more items"
        )
    # Grouped by song, a turn by the largest group leaves every group.
    partner = [0] * len(songs)
    for place, index in enumerate(order):
        partner[index] = order[(place + largest) % len(order)]
    return partner


def frame_count(samples: int) -> int:
    """Number of frames at 20 Hz in that many samples at 48 kHz."""
    return -(-samples // _HOP_SAMPLES)


def _sung_frames(chroma: np.ndarray, pitches: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Chroma [sung, 12] and pitch classes [sung] of the frames in which somebody sings."""
    frames = min(len(chroma), len(pitches))
    sung = np.isfinite(pitches[:frames])
    classes = np.round(pitches[:frames][sung]).astype(int) % 12
    return chroma[:frames][sung], classes
