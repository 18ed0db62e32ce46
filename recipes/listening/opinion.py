"""Mean opinion scores with 95 % intervals (P B.4)."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from duotok.recipes.evaluation.intervals import CONFIDENCE, mean_and_margin
from duotok.recipes.listening.ratings import GRADES, Rating

_DRAWS = 4000


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What listeners think of one system."""

    system: str
    mean: float  # 1 to 5
    margin: float  # half the 95 % interval by Student's t over all ratings, as papers report; NaN for one
    low: float  # 95 % interval with listeners and clips drawn anew, which is the honest one: ratings of one
    high: float  # listener, or of one clip, are not independent
    counts: tuple[int, ...]  # ratings by grade, 1 first
    raters: int
    clips: int

    @property
    def ratings(self) -> int:
        """Number of ratings."""
        return sum(self.counts)


def score_systems(ratings: Sequence[Rating], *, seed: int = 0) -> list[Opinion]:
    """The opinions of all rated systems, best first."""
    opinions = []
    for system in sorted({rating.system for rating in ratings}):
        own = [rating for rating in ratings if rating.system == system]
        grades = [rating.grade for rating in own]
        mean, margin = mean_and_margin(grades)
        low, high = _bootstrap(own, seed)
        opinions.append(
            Opinion(
                system=system,
                mean=mean,
                margin=margin,
                low=low,
                high=high,
                counts=tuple(grades.count(grade) for grade in GRADES),
                raters=len({rating.rater for rating in own}),
                clips=len({rating.clip for rating in own}),
            )
        )
    return sorted(opinions, key=lambda opinion: -opinion.mean)


def _bootstrap(ratings: Sequence[Rating], seed: int) -> tuple[float, float]:
    """Percentiles of the mean when listeners and clips are drawn with replacement, each on their own."""
    raters = sorted({rating.rater for rating in ratings})
    clips = sorted({rating.clip for rating in ratings})
    grades, rated = np.zeros((len(raters), len(clips))), np.zeros((len(raters), len(clips)))
    for rating in ratings:
        place = raters.index(rating.rater), clips.index(rating.clip)
        grades[place] += rating.grade
        rated[place] += 1
    rng = np.random.default_rng(seed)
    rater_counts, clip_counts = (
        rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS) for count in grades.shape
    )
    totals = np.einsum("dr,rc,dc->d", rater_counts, grades, clip_counts)
    weights = np.einsum("dr,rc,dc->d", rater_counts, rated, clip_counts)
    means = totals[weights > 0] / weights[weights > 0]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)
