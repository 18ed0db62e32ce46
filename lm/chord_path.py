"""The most likely chords over time: a chain that changes where bands change chords, at the beats of a bar."""

import numpy as np

from .lead_sheet import PLACES, UNKNOWN

EVIDENCE = 0.2  # of a frame's log-probabilities: neighbouring frames say much the same
# Cost of a change in nats: at a bar line, in the middle of a bar, at another quarter of it, anywhere else.
BAR_COST, HALF_COST, QUARTER_COST, OTHER_COST = 3.0, 4.0, 6.0, 20.0


def track_chords(log_probabilities: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the chord of each frame [frames].

    log_probabilities: [frames, CHORDS]. places: [frames], the frame's place in the bar or UNKNOWN.
    """
    frames = len(log_probabilities)
    if frames == 0:
        return np.zeros(0, dtype=np.int64)
    costs = change_costs(places)
    score = EVIDENCE * log_probabilities[0]
    origin = np.zeros(log_probabilities.shape, dtype=np.int64)
    own = np.arange(log_probabilities.shape[1])
    for frame in range(1, frames):
        best = int(score.argmax())
        changed = score[best] - costs[frame]
        origin[frame] = np.where(score >= changed, own, best)
        score = np.maximum(score, changed) + EVIDENCE * log_probabilities[frame]
    chords = np.empty(frames, dtype=np.int64)
    chords[-1] = score.argmax()
    for frame in range(frames - 1, 0, -1):
        chords[frame - 1] = origin[frame, chords[frame]]
    return chords


def change_costs(places: np.ndarray) -> np.ndarray:
    """What a change of chord costs at each frame [frames]: little where a new quarter of the bar begins."""
    previous = np.concatenate([places[:1], places[:-1]])
    by_quarter = np.array([BAR_COST, QUARTER_COST, HALF_COST, QUARTER_COST])
    quarters, before = places * 4 // PLACES, previous * 4 // PLACES
    begins = (places != UNKNOWN) & ((quarters != before) | (previous == UNKNOWN))
    return np.where(begins, by_quarter[quarters.clip(0, 3)], OTHER_COST)
