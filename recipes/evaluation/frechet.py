"""Frechet distances between sets of sounds, and the anchors that tell what a distance means.

A Frechet distance of few samples is too large, the more so the fewer they are. All distances that are to be
compared are therefore taken between sets of the same number of patches, and averaged over draws.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

DRAWS = 20
_FEWEST_SONGS = 4  # of a style that is cut into halves


@dataclass(frozen=True, kw_only=True)
class Anchors:
    """Distances between originals, at `patches` patches a side."""

    patches: int
    same_style: float  # two random halves of the songs of one style
    other_style: float  # random halves of two styles
    same_corpus: float  # two random halves of all songs
    styles: tuple[str, ...]

    def figures(self) -> dict[str, float]:
        """Flat figures."""
        return {
            "frechet_patches": self.patches,
            "frechet_same_style": self.same_style,
            "frechet_other_style": self.other_style,
            "frechet_same_corpus": self.same_corpus,
            "frechet_styles": len(self.styles),
        }


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Frechet distance of the normal distributions of two sets of features (Dowson & Landau, 1982).

    first, second: [samples, features], at least two samples each.
    """
    means = first.mean(axis=0), second.mean(axis=0)
    # With A and B the centred sets over sqrt(samples - 1), the trace of the root of the product of the
    # covariances A'A and B'B is the sum of the singular values of AB', also where they have no full rank.
    centred = [
        (values - mean) / np.sqrt(len(values) - 1)
        for values, mean in zip((first, second), means, strict=True)
    ]
    shared = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    spread = sum(np.square(values).sum() for values in centred) - 2 * shared
    return float(np.square(means[0] - means[1]).sum() + max(0.0, spread))


def matched_distance(first: np.ndarray, second: np.ndarray, *, patches: int, seed: int) -> float:
    """Mean distance of the same randomly drawn rows of two sets of corresponding rows [samples, features]."""
    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(DRAWS):
        rows = rng.permutation(len(first))[:patches]
        distances.append(frechet_distance(first[rows], second[rows]))
    return float(np.mean(distances))


def measure_anchors(
    features: Mapping[str, np.ndarray], styles: Mapping[str, str], *, most_patches: int, seed: int
) -> Anchors | None:
    """Distances between halves of the songs; None where fewer than two styles have four songs.

    features: song -> [patches, features]; styles: song -> style. Both sides always have the same number of
    patches: as many as the smallest half has, and no more than most_patches.
    """
    songs: dict[str, list[str]] = {}
    for song in sorted(features):
        songs.setdefault(styles[song], []).append(song)
    groups = {style: names for style, names in sorted(songs.items()) if len(names) >= _FEWEST_SONGS}
    if len(groups) < 2:
        return None
    rng = np.random.default_rng(seed)
    draws = [{style: _halve(names, rng) for style, names in groups.items()} for _ in range(DRAWS)]
    sizes = [
        sum(len(features[song]) for song in half) for draw in draws for pair in draw.values() for half in pair
    ]
    patches = min(most_patches, *sizes)

    def distance(first: Sequence[str], second: Sequence[str]) -> float:
        sides = [np.concatenate([features[song] for song in side]) for side in (first, second)]
        return frechet_distance(*(side[rng.permutation(len(side))[:patches]] for side in sides))

    same, other, whole = [], [], []
    for draw in draws:
        same += [distance(*pair) for pair in draw.values()]
        other += [distance(draw[a][0], draw[b][0]) for a, b in combinations(draw, 2)]
        whole.append(distance(*_halve(sorted(features), rng)))
    return Anchors(
        patches=patches,
        same_style=float(np.mean(same)),
        other_style=float(np.mean(other)),
        same_corpus=float(np.mean(whole)),
        styles=tuple(groups),
    )


def _halve(names: Sequence[str], rng: np.random.Generator) -> tuple[list[str], list[str]]:
    order = [names[int(index)] for index in rng.permutation(len(names))]
    return order[: len(order) // 2], order[len(order) // 2 :]
