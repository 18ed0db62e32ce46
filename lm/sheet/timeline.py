"""The beats of a whole song, as real numbers of frames, out of what each frame says of its place in the bar.

One tempo for all of it where the singer keeps one, found by the Fourier transform of the evidence (a grid of
bars is a comb), else a curve that bends with the singer, found by dynamic programming over tempo and phase
(F. Krebs et al., An Efficient State-Space Model for Joint Tempo and Meter Tracking, 2015). Then each beat
gets its number in the bar: four in a bar, seldom fewer or more. Silence keeps the time.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from ...tokenizer.music.harmony import find_path
from .columns import BEATS_PER_BAR, METERS, PLACES, UNKNOWN

BAR_SECONDS = (1.1, 4.6)  # the shortest and the longest bar of four beats
_SHORTEST_SECONDS = 0.9  # of a bar of other than four beats
EVIDENCE = 0.12  # of a frame's log-probabilities: neighbouring frames say much the same
_NUMBER_COST = 100.0  # nats for a bar of other than four beats
_HARMONICS = PLACES // 2
_PHASES = 128  # of a bar
# Usual lengths of a bar by its beats, as log-normals: what scores have (POP909; OpenEWLD and Lieder).
_BAR_CENTRE_SECONDS, _BAR_WIDTH, _BAR_WEIGHT = {2: 1.5, 3: 1.9, 4: 3.05, 6: 1.8}, 0.25, 2.0
_WINDOW_SECONDS = 8.0  # through which a curve has one tempo
_BENDS = np.linspace(-0.12, 0.12, 97)  # deviations of a window's tempo from the song's
_BEND_SPREAD = 0.003  # from one window to the next
_CURVE_GAIN = 0.1  # by how much of the evidence of one tempo a curve must be better
_SMOOTHNESS = 3.0
_TWO_TEMPI_NATS = 150.0  # of evidence that one time line loses in half of a song that has two tempi
_PIECE = 2_048  # frequencies judged at a time


@dataclass(frozen=True, kw_only=True)
class TimeLine:
    """The beats of a song, from before its first frame to behind its last."""

    beats: np.ndarray  # [beats] in frames, real numbers
    numbers: np.ndarray  # [beats] place of each beat in its bar, 0 at a bar line
    rate_hz: float  # frames per second
    beats_per_bar: int = BEATS_PER_BAR  # as a rule

    @cached_property
    def bar_lines(self) -> np.ndarray:
        """Beats that begin a bar [bars], in frames."""
        return self.beats[self.numbers == 0]

    @property
    def tempo_bpm(self) -> float:
        """The usual tempo."""
        return float(60 * self.rate_hz / np.median(np.diff(self.beats)))

    def places(self, frames: int) -> np.ndarray:
        """Place in the bar [frames], 0..PLACES - 1, of the middle of each frame."""
        turns = np.interp(np.arange(frames) + 0.5, self.beats, np.arange(len(self.beats)))
        index = np.minimum(turns.astype(int), len(self.beats) - 1)
        within = (turns - index).clip(0, 1 - 1e-9) * PLACES / self.beats_per_bar
        return np.minimum(self.numbers[index] * PLACES / self.beats_per_bar + within, PLACES - 1).astype(int)

    def beats_of(self, frames: int) -> np.ndarray:
        """Number of the beat [frames] that sounds in the middle of each frame."""
        return np.searchsorted(self.beats, np.arange(frames) + 0.5, side="right") - 1


def places_between(lines: np.ndarray, frames: int) -> np.ndarray:
    """Return each frame's place in the bar [frames] between bar lines in frames; UNKNOWN outside of them."""
    places = np.full(frames, UNKNOWN)
    if len(lines) > 1:
        middles = np.arange(frames) + 0.5
        inside = (middles >= lines[0]) & (middles < lines[-1])
        turns = np.interp(middles, lines, np.arange(len(lines)))[inside] % 1
        places[inside] = (turns * PLACES).astype(int).clip(0, PLACES - 1)
    return places


def places_in(place: np.ndarray, beats_per_bar: int) -> np.ndarray:
    """Log-probabilities of the place [frames, PLACES] in bars of a meter, by those of meter and place.

    place: [frames, METERS, PLACES]. Of a meter that nothing is said of (-inf), by all the others.
    """
    told = place[:, METERS.index(beats_per_bar)]
    if not np.isfinite(told).all():
        told = np.logaddexp.reduce(place, axis=1)
    return told - np.logaddexp.reduce(told, axis=1, keepdims=True)


def find_meter(
    place: np.ndarray,
    rate_hz: float,
    *,
    among: Collection[int] = METERS,
    tempo_bpm: float | None = None,
    downbeat_seconds: float | None = None,
) -> int:
    """The beats of a bar, some of `among`, with the likeliest time line.

    place: log-probabilities of meter and place in the bar [frames, METERS, PLACES], one frame or more; -inf
    of meters that are not known.
    """
    known = [n for n, beats in enumerate(METERS) if beats in among and np.isfinite(place[:, n]).all()]
    if len(known) < 2:
        return METERS[known[0]] if known else BEATS_PER_BAR
    frames, scores = len(place), {}
    downbeat = None if downbeat_seconds is None else downbeat_seconds * rate_hz
    for number in known:
        beats = METERS[number]
        evidence = EVIDENCE * (places_in(place, beats) + np.log(PLACES))
        turns = _keep_one_tempo(evidence, rate_hz, tempo_bpm, downbeat, beats)
        line, _ = _number_beats(evidence, turns, rate_hz, downbeat, beats)
        scores[beats] = float(place[np.arange(frames), number, line.places(frames)].mean())
    return max(scores, key=lambda beats: scores[beats])


def find_time_line(
    place: np.ndarray,
    rate_hz: float,
    *,
    tempo_bpm: float | None = None,
    downbeat_seconds: float | None = None,
    beats_per_bar: int = BEATS_PER_BAR,
) -> TimeLine:
    """The beats by log-probabilities of the place in the bar [frames, PLACES], one frame or more.

    tempo_bpm: kept to the sample for ever. downbeat_seconds: where a bar begins.
    """
    evidence = EVIDENCE * (place + np.log(PLACES))
    downbeat = None if downbeat_seconds is None else downbeat_seconds * rate_hz
    turns = _keep_one_tempo(evidence, rate_hz, tempo_bpm, downbeat, beats_per_bar)
    line, score = _number_beats(evidence, turns, rate_hz, downbeat, beats_per_bar)
    if tempo_bpm is None and len(evidence) > 3 * _WINDOW_SECONDS * rate_hz:
        bends = _follow(evidence, rate_hz, turns)
        bent, found = _number_beats(evidence, bends, rate_hz, downbeat, beats_per_bar)
        if found > score + _CURVE_GAIN * abs(score):
            return bent
    return line


def find_other_tempo(place: np.ndarray, line: TimeLine) -> tuple[float, float]:
    """Half or double the tempo, whichever is likelier, and its share of the evidence of both, 0 to 1."""
    evidence = EVIDENCE * (place + np.log(PLACES))

    def judge(tempo_bpm: float) -> float:
        turns = _keep_one_tempo(evidence, line.rate_hz, tempo_bpm, None, line.beats_per_bar)
        return max(0.0, _number_beats(evidence, turns, line.rate_hz, None, line.beats_per_bar)[1])

    score, other = max((judge(factor * line.tempo_bpm), factor * line.tempo_bpm) for factor in (0.5, 2.0))
    total = score + judge(line.tempo_bpm)
    return other, score / total if total > 0 else 0.5


def find_two_tempi(place: np.ndarray, line: TimeLine) -> tuple[float, float] | None:
    """Tempi of the first and the second half of a song, if one time line does not do for both; else None."""
    found, lost, half = [], 0.0, len(place) // 2
    for first, last in ((0, half), (half, len(place))):
        if last - first < _WINDOW_SECONDS * line.rate_hz:
            return None
        evidence = EVIDENCE * (place[first:last] + np.log(PLACES))
        turns = _keep_one_tempo(evidence, line.rate_hz, None, None, line.beats_per_bar)
        own, score = _number_beats(evidence, turns, line.rate_hz, None, line.beats_per_bar)
        kept = evidence[np.arange(last - first), line.places(len(place))[first:last]].sum()
        lost = max(lost, score - kept)
        found.append(own.tempo_bpm)
    return (found[0], found[1]) if lost > _TWO_TEMPI_NATS else None


def _harmonics_of(evidence: np.ndarray) -> np.ndarray:
    """Fourier series over the bar of what frames say [frames, PLACES] -> [frames, harmonics + 1]."""
    middles = (np.arange(PLACES) + 0.5) / PLACES
    weights = np.where(np.isin(np.arange(_HARMONICS + 1), (0, _HARMONICS)), 1, 2) / PLACES
    return evidence @ (np.exp(-2j * np.pi * np.outer(middles, np.arange(_HARMONICS + 1))) * weights)


def _over_phases(sums: np.ndarray) -> np.ndarray:
    """Evidence [..., _PHASES] of a grid at every phase, by its sums over time [..., harmonics + 1]."""
    phases = np.arange(_PHASES) / _PHASES
    return np.real(sums @ np.exp(2j * np.pi * np.outer(np.arange(_HARMONICS + 1), phases)))


def _keep_one_tempo(
    evidence: np.ndarray,
    rate_hz: float,
    tempo_bpm: float | None,
    downbeat: float | None,
    beats_per_bar: int,
) -> np.ndarray:
    """Bars passed [frames + 1] at the borders of the frames, by the best grid of one tempo."""
    frames, series = len(evidence), _harmonics_of(evidence)
    times = np.arange(frames) + 0.5

    def judge(bars_per_frame: np.ndarray) -> np.ndarray:
        """Evidence [tempi, _PHASES], exactly; where the downbeat is known, of its phase alone."""
        sums, wave = [], np.ones((len(bars_per_frame), frames), dtype=complex)
        turn = np.exp(2j * np.pi * np.outer(bars_per_frame, times))
        for m in range(_HARMONICS + 1):
            sums.append(wave @ series[:, m])
            wave *= turn
        scores = _over_phases(np.stack(sums, axis=-1))
        if downbeat is None:
            return scores
        known = np.round(-bars_per_frame * downbeat * _PHASES).astype(int) % _PHASES
        return np.where(np.arange(_PHASES) == known[:, None], scores, -np.inf)

    if tempo_bpm is not None:
        tempi = np.array([tempo_bpm / (60 * beats_per_bar * rate_hz)])
    else:
        size = 1 << int(np.ceil(np.log2(8 * frames)))
        spectra = [np.fft.ifft(series[:, m], size) * size for m in range(_HARMONICS + 1)]
        shortest = BAR_SECONDS[0] if beats_per_bar == BEATS_PER_BAR else _SHORTEST_SECONDS
        low, high = 1 / (BAR_SECONDS[1] * rate_hz), 1 / (shortest * rate_hz)
        tempi = np.arange(low, high, 1 / (8 * max(frames, 100)))
        usual = tempi * rate_hz * _BAR_CENTRE_SECONDS[beats_per_bar]
        prior = -0.5 * _BAR_WEIGHT * (np.log(usual) / _BAR_WIDTH) ** 2
        best, middle = -np.inf, tempi[0]
        for start in range(0, len(tempi), _PIECE):
            piece = tempi[start : start + _PIECE]
            sums = np.stack(
                [
                    spectrum[np.round(m * piece * size).astype(int) % size] * np.exp(1j * np.pi * m * piece)
                    for m, spectrum in enumerate(spectra)
                ],
                axis=-1,
            )
            scores = _over_phases(sums).max(axis=1) + prior[start : start + _PIECE]
            if scores.max() > best:
                best, middle = float(scores.max()), float(piece[scores.argmax()])
        for finer in (64, 512):
            tempi = middle + np.arange(-12, 13) / (finer * max(frames, 100))
            middle = float(tempi[judge(tempi).max(axis=1).argmax()])
        tempi = np.array([middle])
    scores = judge(tempi)
    if downbeat is not None:
        return tempi[0] * (np.arange(frames + 1) - downbeat)
    phase = int(scores[0].argmax())
    before, here, after = (scores[0, (phase + shift) % _PHASES] for shift in (-1, 0, 1))
    bend = before - 2 * here + after  # the top of a parabola lies between the phases that were tried
    top = phase + (0.5 * (before - after) / bend if bend < 0 else 0.0)
    return tempi[0] * np.arange(frames + 1) + top / _PHASES


def _follow(evidence: np.ndarray, rate_hz: float, turns: np.ndarray) -> np.ndarray:
    """Bars passed [frames + 1] where the tempo bends around the one that `turns` has."""
    frames, series = len(evidence), _harmonics_of(evidence)
    count = round(frames / (_WINDOW_SECONDS * rate_hz))
    edges = np.linspace(0, frames, count + 1).round().astype(int)
    tempi = (turns[-1] - turns[0]) / frames * (1 + _BENDS)
    costs = -0.5 * np.square((_BENDS[:, None] - _BENDS[None, :]) / _BEND_SPREAD)
    scores = []
    for low, high in zip(edges[:-1], edges[1:], strict=True):
        waves = np.exp(2j * np.pi * np.outer(tempi, np.arange(high - low) + 0.5))
        sums = [(waves**m) @ series[low:high, m] for m in range(_HARMONICS + 1)]
        scores.append(_over_phases(np.stack(sums, axis=-1)))
    total, origins = scores[0], []
    # How far the phase comes in a window of each tempo.
    steps = np.round(np.outer(np.diff(edges), tempi) * _PHASES).astype(int)  # [windows, tempi]
    phases = np.arange(_PHASES)
    for window in range(1, count):
        moved = np.take_along_axis(total, (phases[None] - steps[window - 1][:, None]) % _PHASES, axis=1)
        chains = moved[:, None, :] + costs[:, :, None]  # [before, after, phases]
        origins.append(chains.argmax(axis=0))
        total = chains.max(axis=0) + scores[window]
    tempo, phase = np.unravel_index(total.argmax(), total.shape)
    path = [(int(tempo), int(phase))]
    for window in range(count - 1, 0, -1):
        tempo = origins[window - 1][path[-1]]
        path.append((int(tempo), int(path[-1][1] - steps[window - 1][tempo]) % _PHASES))
    path.reverse()
    bars = [path[0][1] / _PHASES]
    for (tempo, _), length in zip(path, np.diff(edges), strict=True):
        bars.append(bars[-1] + length * tempi[tempo])
    for window in range(1, count):  # the phases of the path, not the rounded sums
        bars[window] += (path[window][1] / _PHASES - bars[window] + 0.5) % 1 - 0.5
    return np.interp(np.arange(frames + 1), edges, _smooth(np.array(bars)))


def _smooth(values: np.ndarray) -> np.ndarray:
    """Values without the steps of the grid they were found on (Whittaker's smoother)."""
    if len(values) < 4:
        return values
    bend = np.diff(np.eye(len(values)), n=3, axis=0)
    return np.linalg.solve(np.eye(len(values)) + _SMOOTHNESS * bend.T @ bend, values)


def _number_beats(
    evidence: np.ndarray, turns: np.ndarray, rate_hz: float, downbeat: float | None, beats_per_bar: int
) -> tuple[TimeLine, float]:
    """The time line of bars passed [frames + 1], and its evidence in nats."""
    frames = len(evidence)
    first, last = int(np.floor(turns[0] * beats_per_bar)), int(np.ceil(turns[-1] * beats_per_bar))
    # One beat and more outside at both ends, by the tempo there.
    slopes = [max(float(slope), 1e-9) for slope in (turns[1] - turns[0], turns[-1] - turns[-2])]
    borders = np.arange(frames + 1, dtype=float)
    knots = np.concatenate(
        [[turns[0] - 2 * slopes[0] * frames - 2], turns, [turns[-1] + 2 * slopes[1] * frames + 2]]
    )
    where = np.concatenate(
        [[(knots[0] - turns[0]) / slopes[0]], borders, [frames + (knots[-1] - turns[-1]) / slopes[1]]]
    )
    beats = np.interp(np.arange(first, last + 2) / beats_per_bar, knots, where)
    count = np.arange(len(beats))
    line = TimeLine(beats=beats, numbers=count % beats_per_bar, rate_hz=rate_hz, beats_per_bar=beats_per_bar)
    index = line.beats_of(frames).clip(0)
    scores = np.zeros((len(beats), beats_per_bar))
    for number in range(beats_per_bar):
        line = replace(line, numbers=np.full(len(beats), number))
        told = evidence[np.arange(frames), line.places(frames)]
        scores[:, number] = np.bincount(index, weights=told, minlength=len(beats))
    if downbeat is not None:
        known = int(np.abs(beats - downbeat).argmin())
        scores[known, 1:] -= 1e6
    # In equal bars a beat's number less its place is the same for all: a path that seldom changes.
    scores = scores[count[:, None], (count[:, None] + np.arange(beats_per_bar)) % beats_per_bar]
    offsets = find_path(scores, np.full(len(beats), _NUMBER_COST))
    score = scores[count, offsets].sum() - _NUMBER_COST * np.count_nonzero(np.diff(offsets))
    return replace(line, numbers=(count + offsets) % beats_per_bar), float(score)
