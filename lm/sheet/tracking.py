"""Bars and chords of a song from what each frame says of them: the most likely chains.

A bar is one state: the score of every bar of every length is a difference of running sums, and a chain of
bars is found by dynamic programming over where they end. Lengths of neighbours differ little, as a singer's
tempo does (F. Krebs et al., An Efficient State-Space Model for Joint Tempo and Meter Tracking, 2015).
Chords change where bands change them, at the beats of a bar.
"""

import numpy as np

from ...tokenizer.music.harmony import find_path
from .columns import PLACES, UNKNOWN
from .timeline import BAR_SECONDS

TEMPO_SPREAD = 0.01  # deviation of the logarithm of a bar's length from the one before
BAR_EVIDENCE = 0.12  # of a frame's log-probabilities: neighbouring frames say much the same
CHORD_EVIDENCE = 0.2
# Cost of a change in nats: at a bar line, in the middle of a bar, at another quarter of it, anywhere else.
BAR_COST, HALF_COST, QUARTER_COST, OTHER_COST = 3.0, 4.0, 6.0, 20.0


def track_bars(log_probabilities: np.ndarray, rate_hz: float) -> np.ndarray:
    """Return bar lines [bars + 1] in frames, the first at 0 or before, the last at the end or behind it.

    log_probabilities: [frames, PLACES] of a frame's place.
    """
    lengths = np.arange(
        max(PLACES // 2, int(np.floor(BAR_SECONDS[0] * rate_hz))), int(np.ceil(BAR_SECONDS[1] * rate_hz)) + 1
    )
    longest = int(lengths[-1])
    # Before the first frame and behind the last nothing is said: the outer bars may reach out.
    around = np.zeros((longest, PLACES))
    evidence = np.concatenate([around, BAR_EVIDENCE * (log_probabilities + np.log(PLACES)), around])
    total = len(evidence)
    scores = _score_bars(evidence, lengths)  # [starts, lengths]
    change = np.log(lengths[:, None] / lengths[None, :]) / TEMPO_SPREAD
    change = -0.5 * np.square(change)  # [length, length before]
    arrived = np.full((total + 1, len(lengths)), -np.inf)  # best chain whose last bar, of a length, ends here
    before = np.full((total + 1, len(lengths)), -1)  # its last bar but one
    for start in range(total):
        chains = change + arrived[start]
        best = chains.argmax(axis=1)
        reached = chains[np.arange(len(lengths)), best]
        if start <= longest:  # a chain may begin here
            best = np.where(reached < 0, -1, best)
            reached = np.maximum(reached, 0.0)
        fits = np.flatnonzero(np.isfinite(reached) & (start + lengths <= total))
        ends = start + lengths[fits]
        arrived[ends, fits] = reached[fits] + scores[start, fits]
        before[ends, fits] = best[fits]
    ends = slice(total - longest, total + 1)
    place, length = np.unravel_index(arrived[ends].argmax(), arrived[ends].shape)
    end = int(place) + total - longest
    lines = [end]
    while length >= 0:
        end, length = end - int(lengths[length]), before[end, length]
        lines.append(end)
    return np.array(lines[::-1]) - longest


def places_between(lines: np.ndarray, frames: int) -> np.ndarray:
    """Return each frame's place in the bar [frames] between bar lines in frames; UNKNOWN outside of them."""
    places = np.full(frames, UNKNOWN)
    if len(lines) > 1:
        middles = np.arange(frames) + 0.5
        inside = (middles >= lines[0]) & (middles < lines[-1])
        turns = np.interp(middles, lines, np.arange(len(lines)))[inside] % 1
        places[inside] = (turns * PLACES).astype(int).clip(0, PLACES - 1)
    return places


def _score_bars(evidence: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Evidence summed over a bar [starts, lengths]; -inf where the bar would not end in time."""
    total = len(evidence)
    sums = np.concatenate([np.zeros((1, PLACES)), evidence.cumsum(axis=0)])
    scores = np.full((total, len(lengths)), -np.inf)
    for number, length in enumerate(lengths):
        count = total - length + 1
        # Frame i of the bar has the place of its middle, as in `places_between`.
        edges = np.ceil(np.arange(PLACES + 1) * length / PLACES - 0.5).astype(int)
        scores[:count, number] = sum(
            sums[edges[place + 1] : edges[place + 1] + count, place]
            - sums[edges[place] : edges[place] + count, place]
            for place in range(PLACES)
        )
    return scores


def track_chords(log_probabilities: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the chord of each frame [frames].

    log_probabilities: [frames, CHORDS]. places: [frames], the frame's place in the bar or UNKNOWN.
    """
    return find_path(CHORD_EVIDENCE * log_probabilities, change_costs(places))


def change_costs(places: np.ndarray) -> np.ndarray:
    """What a change of chord costs at each frame [frames]: little where a new quarter of the bar begins."""
    previous = np.concatenate([places[:1], places[:-1]])
    by_quarter = np.array([BAR_COST, QUARTER_COST, HALF_COST, QUARTER_COST])
    quarters, before = places * 4 // PLACES, previous * 4 // PLACES
    begins = (places != UNKNOWN) & ((quarters != before) | (previous == UNKNOWN))
    return np.where(begins, by_quarter[quarters.clip(0, 3)], OTHER_COST)
