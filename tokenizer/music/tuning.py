"""How far a singer is from A = 440 Hz, and the clock on which the same singing is at that pitch.

A singer 30 cents flat is in tune when the recording is played faster; what is composed to that is in tune
with the singer when it is played as much slower. `PitchClock` does both, for a deviation that drifts as well.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import Any

import numpy as np
import soxr
import torch
from torch import Tensor

from ..common.audio import SAMPLE_RATE_HZ
from ..common.long_waves import let_go, new_wave
from .pitch import PITCH_RATE_HZ

LEAST_CONFIDENCE = 0.2  # below this nobody can say how the singer is tuned: speech, rap, noise
LEAST_DRIFT_CENTS = 15.0  # what moves less is one tuning, sung as people sing
_POINT_SECONDS = 1.0  # between two points of the curve
_KNOT_SECONDS = 0.1  # between two points of a clock; its speed is constant from one to the next
_NOTE_FRAMES = 0.25 * PITCH_RATE_HZ  # frames nearer than that share one error of the singer's
_VIBRATO_FRAMES = 9  # about one turn of a vibrato, over which the pitch is averaged
_BEYOND_SECONDS = 1e7  # for moments after the end, where a clock goes on as it ends
_GLIDE = 5.0  # semitones a second, at which a frame counts half
_BINS = 50  # of 2 cents
_STEP_CENTS = 3.0  # by which a tuning moves in one second, as a rule
_STIFFNESS_SECONDS = 8.0  # what lasts less than about four times that is the melody's, not the tuning's
_ITERATIONS = 30
_OVERSAMPLING = 2
_TAPS = 8  # of Lagrange's interpolation
_BLOCK_SAMPLES, _CACHED = 200_000, 50_000  # samples that are read, and that are interpolated, at once
_MARGIN = 256  # samples beside a block, so that its borders do not matter


@dataclass(frozen=True, kw_only=True, eq=False)
class Tuning:
    """A deviation from equal temperament at A = 440 Hz."""

    cents: float  # the mean, -50 to 50
    curve: np.ndarray  # [points] cents every second of the song, continuous: it may leave -50 to 50
    confidence: float  # 0 to 1: how closely the sung pitches keep to one temperament

    @property
    def drift_cents(self) -> float:
        """Between the lowest and the highest point of the curve; 0 of one that counts as constant."""
        return float(np.ptp(self.curve))


def estimate_tuning(pitches: np.ndarray) -> Tuning | None:
    """Return the tuning of a whole song, None where hardly anything is sung.

    pitches: [frames] MIDI pitch at 50 Hz, NaN where nothing is sung, as `sung_pitch` gives it. Each frame,
    averaged over a turn of a vibrato, says where it is between two semitones, a glide less than a held note.
    The deviation is followed through time by its likeliest path round the circle of a semitone, so that it
    can drift by any amount, and smoothed; a drift below LEAST_DRIFT_CENTS is left out.
    """
    if len(pitches) < 2:
        return None
    voiced, window = np.isfinite(pitches), np.ones(_VIBRATO_FRAMES)
    count = np.convolve(voiced, window, mode="same")[: len(pitches)]
    pitches = np.convolve(np.where(voiced, pitches, 0.0), window, mode="same")[: len(pitches)]
    pitches = pitches / np.maximum(count, 1)
    glide = np.gradient(pitches) * PITCH_RATE_HZ
    held = voiced & (count > _VIBRATO_FRAMES / 2)
    weights = np.where(held, 1 / (1 + np.square(glide / _GLIDE)), 0.0)
    if weights.sum() < 2 * _NOTE_FRAMES:
        return None
    turns = weights * np.exp(2j * np.pi * pitches)
    size = round(_POINT_SECONDS * PITCH_RATE_HZ)
    heights, masses = (
        np.pad(values, (0, -len(values) % size)).reshape(-1, size).sum(axis=1) for values in (turns, weights)
    )
    curve = _smooth(heights, masses, _unwrap(heights))
    sung = np.flatnonzero(masses)
    curve[: sung[0]], curve[sung[-1] :] = curve[sung[0]], curve[sung[-1]]
    if np.ptp(curve) < LEAST_DRIFT_CENTS / 100:
        curve = np.full(len(curve), np.angle(heights.sum()) / (2 * np.pi))
    mean = float(np.average(curve, weights=masses))
    along = np.real(heights @ np.exp(-2j * np.pi * curve)) / masses.sum()
    # What is left of it beyond what chance gives so few notes.
    confidence = np.sqrt(max(0.0, max(0.0, along) ** 2 - 3 * _NOTE_FRAMES / masses.sum()))
    shift = round(mean)
    return Tuning(cents=100 * (mean - shift), curve=100 * (curve - shift), confidence=float(confidence))


def _unwrap(heights: np.ndarray) -> np.ndarray:
    """The likeliest continuous path [points] in semitones through complex sums of phases [points]."""
    bins = np.arange(_BINS) / _BINS
    away = (bins[:, None] - bins[None] + 0.5) % 1 - 0.5  # [to, from]
    cost = np.square(100 * away / (_STEP_CENTS * _POINT_SECONDS)) / 2
    agreement = np.real(heights[:, None] * np.exp(-2j * np.pi * bins)) * 2 / _NOTE_FRAMES  # [points, bins]
    score, links = agreement[0], np.zeros((len(heights), _BINS), dtype=int)
    for point in range(1, len(heights)):
        total = score[None] - cost
        links[point] = total.argmax(axis=1)
        score = total.max(axis=1) + agreement[point]
    path = np.zeros(len(heights), dtype=int)
    path[-1] = score.argmax()
    for point in range(len(heights) - 1, 0, -1):
        path[point - 1] = links[point, path[point]]
    steps = away[path[1:], path[:-1]]
    return bins[path[0]] + np.concatenate([[0.0], np.cumsum(steps)])


def _smooth(heights: np.ndarray, masses: np.ndarray, curve: np.ndarray) -> np.ndarray:
    """The smooth curve [points] near the given one that agrees best with the phases.

    It maximizes the sum of cosines of the phases' distances, less a penalty on its bends: a smoothing spline
    for angles, which an outlier hardly moves.
    """
    from scipy.linalg import solveh_banded  # as few runs need it

    points, mean = len(curve), masses.sum() / np.count_nonzero(masses)
    penalty = 1e-3 * mean * _squared_differences(points, 1)
    if points > 2:
        penalty += mean * (_STIFFNESS_SECONDS / _POINT_SECONDS) ** 4 * _squared_differences(points, 2)
    matrix = penalty.copy()
    matrix[-1] += masses
    for _ in range(_ITERATIONS):
        pull = np.imag(heights * np.exp(-2j * np.pi * curve)) / (2 * np.pi)
        curve = solveh_banded(matrix, masses * curve + pull)
    return curve


def _squared_differences(points: int, order: int) -> np.ndarray:
    """Upper bands [3, points] of the matrix of the sum of squared differences of an order, 1 or 2."""
    bands = np.zeros((3, points))
    kernel = (-1.0, 1.0) if order == 1 else (1.0, -2.0, 1.0)
    for first, left in enumerate(kernel):
        for second, right in enumerate(kernel[first:], start=first):
            bands[2 - second + first, second : points - order + second] += left * right
    return bands


class PitchClock:
    """Seconds of a song, and seconds of the same song resampled so that its pitch is at A = 440 Hz.

    Both directions are exact inverses of each other.
    """

    def __init__(self, cents: float | np.ndarray, seconds: float) -> None:
        """cents: the deviation, constant or [points] every second of the song; seconds: its length."""
        count = 2 if np.ndim(cents) == 0 else round(seconds / _KNOT_SECONDS) + 2
        self._song = np.append(np.linspace(0.0, seconds, count), seconds + _BEYOND_SECONDS)
        middles = (self._song[1:] + self._song[:-1]) / 2
        curve = np.atleast_1d(np.asarray(cents, dtype=float))
        at = (np.arange(len(curve)) + 0.5) * _POINT_SECONDS
        speeds = 2 ** (np.interp(middles, at, curve) / 1200)
        self._pitched = np.concatenate([[0.0], np.cumsum(speeds * np.diff(self._song))])
        self.seconds = seconds
        self.cents = np.asarray(cents, dtype=float)

    def to_pitched(self, seconds: Any) -> Any:
        """Where moments of the song are when it is at pitch, in seconds: of one, or an array of them."""
        return np.interp(seconds, self._song, self._pitched)

    def to_song(self, seconds: Any) -> Any:
        """Where moments at pitch are in the song, in seconds: of one, or an array of them."""
        return np.interp(seconds, self._pitched, self._song)

    @property
    def mean_speed(self) -> float:
        """Seconds at pitch for each second of the song."""
        return float(self.to_pitched(self.seconds)) / self.seconds

    def bring_to_pitch(self, wave: Tensor, samples: int | None = None, start: float = 0.0) -> Tensor:
        """Return a wave of the song [channels, n], from its start on, as it sounds at pitch.

        samples: how many, all by default, from `start` on, in seconds at pitch; only these are computed.
        """
        if samples is None:
            length = float(self.to_pitched(wave.shape[-1] / SAMPLE_RATE_HZ)) * SAMPLE_RATE_HZ
            samples = int(np.ceil(length - 1e-6))
        return _read_at(wave, lambda seconds: self.to_song(seconds + start), samples)

    def bring_back(self, wave: Tensor, samples: int, start: float = 0.0, wave_start: float = 0.0) -> Tensor:
        """Return what was made at pitch [channels, n] in the singer's tuning: [channels, samples].

        start: of what is returned, in seconds of the song; wave_start: of the wave, in seconds at pitch.
        """
        return _read_at(wave, lambda seconds: self.to_pitched(seconds + start) - wave_start, samples)


def _read_at(wave: Tensor, where: Callable[[np.ndarray], np.ndarray], samples: int) -> Tensor:
    """Return the wave [channels, n] at the moments where(seconds) of the result's own [channels, samples].

    Oversampled, then interpolated by polynomials; outside of the wave is silence.
    """
    result = new_wave(len(wave), samples)
    for start in range(0, samples, _BLOCK_SAMPLES):
        end = min(start + _BLOCK_SAMPLES, samples)
        places = where(np.arange(start, end) / SAMPLE_RATE_HZ) * SAMPLE_RATE_HZ
        first, last = int(np.floor(places[0])) - _MARGIN, int(np.floor(places[-1])) + _MARGIN
        piece = wave[:, max(0, first) : max(0, last)].float().cpu()
        if torch.equal(piece[:1].expand_as(piece), piece):
            piece = piece[:1]  # of one microphone; the same on all sides
        missing = (max(0, -first), last - max(0, first) - piece.shape[-1])
        piece = torch.nn.functional.pad(piece, missing).T.contiguous().numpy()
        fine = torch.from_numpy(soxr.resample(piece, 1, _OVERSAMPLING, quality="VHQ").T.copy())
        places = torch.from_numpy((places - first) * _OVERSAMPLING)
        parts = result[:, start:end].split(_CACHED, dim=1)
        for place, part in zip(places.split(_CACHED), parts, strict=True):
            left = place.long() - (_TAPS // 2 - 1)
            away = [(place - left).float() - tap for tap in range(_TAPS)]  # from each of _TAPS samples
            for tap in range(_TAPS):
                factors = (away[other] / (tap - other) for other in range(_TAPS) if other != tap)
                part += reduce(Tensor.mul_, factors) * fine.index_select(1, left + tap)
        let_go(wave)
        let_go(result)
    return result
