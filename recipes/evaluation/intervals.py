"""Means with 95 % intervals."""

import math
from collections.abc import Sequence

import numpy as np
from scipy.stats import t as student_t

CONFIDENCE = 0.95


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; NaN for fewer than two values.

    The values count as independent.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return (float(found.mean()) if len(found) else math.nan), math.nan
    error = found.std(ddof=1) / math.sqrt(len(found))
    return float(found.mean()), float(student_t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * error)
