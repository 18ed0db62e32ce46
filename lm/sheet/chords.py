"""The most likely chords over time: a chain that changes where bands change chords, at the beats of a bar."""

import numpy as np

from ...tokenizer.music.chords import find_path
from .columns import PLACES, UNKNOWN

EVIDENCE = 0.2  # of a frame's log-probabilities: neighbouring frames say much the same
# Cost of a change in nats: at a bar line, in the middle of a bar, at another quarter of it, anywhere else.
BAR_COST, HALF_COST, QUARTER_COST, OTHER_COST = 3.0, 4.0, 6.0, 20.0


def track_chords(log_probabilities: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the chord of each frame [frames].

    log_probabilities: [frames, CHORDS]. places: [frames], the frame's place in the bar or UNKNOWN.
    """
    return find_path(EVIDENCE * log_probabilities, change_costs(places))


def change_costs(places: np.ndarray) -> np.ndarray:
    """What a change of chord costs at each frame [frames]: little where a new quarter of the bar begins."""
    previous = np.concatenate([places[:1], places[:-1]])
    by_quarter = np.array([BAR_COST, QUARTER_COST, HALF_COST, QUARTER_COST])
    quarters, before = places * 4 // PLACES, previous * 4 // PLACES
    begins = (places != UNKNOWN) & ((quarters != before) | (previous == UNKNOWN))
    return np.where(begins, by_quarter[quarters.clip(0, 3)], OTHER_COST)
