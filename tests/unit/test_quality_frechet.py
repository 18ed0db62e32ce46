"""Frechet distances have their textbook values, and the anchors tell styles apart."""

import numpy as np
import pytest
from scipy.linalg import sqrtm

from duotok.recipes.evaluation.frechet import frechet_distance, matched_distance, measure_anchors


def draw(rng, count, mean=0.0, scale=1.0, features=6):
    return mean + scale * rng.normal(size=(count, features))


def test_the_distance_is_that_of_the_formula():
    rng = np.random.default_rng(0)
    first, second = draw(rng, 40), draw(rng, 50, mean=1, scale=2) @ rng.normal(size=(6, 6))
    covariances = np.cov(first.T), np.cov(second.T)
    root = np.real(sqrtm(covariances[0] @ covariances[1]))
    expected = np.square(first.mean(0) - second.mean(0)).sum() + np.trace(sum(covariances) - 2 * root)
    assert frechet_distance(first, second) == pytest.approx(expected, rel=1e-6)
    assert frechet_distance(second, first) == pytest.approx(expected, rel=1e-6)


def test_known_values():
    rng = np.random.default_rng(0)
    values = draw(rng, 30)
    assert frechet_distance(values, values) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(values, values + 2) == pytest.approx(4 * 6)  # 2 in each of 6 features
    spread = np.square(values - values.mean(0)).sum() / 29
    assert frechet_distance(values, 3 * (values - values.mean(0)) + values.mean(0)) == pytest.approx(
        4 * spread
    )
    # A constant has no covariance.
    assert frechet_distance(values, np.tile(values.mean(0), (5, 1))) == pytest.approx(spread)


def test_fewer_samples_than_features_are_enough():
    rng = np.random.default_rng(0)
    first, second = draw(rng, 5, features=50), draw(rng, 5, features=50)
    assert frechet_distance(first, first) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(first, second) > 1


def test_matched_draws_are_repeatable_and_grow_with_the_difference():
    rng = np.random.default_rng(0)
    values = draw(rng, 60)
    distances = [matched_distance(values, values + shift, patches=20, seed=1) for shift in (0, 0.1, 0.5)]
    assert distances[0] == pytest.approx(0, abs=1e-9) and distances[0] < distances[1] < distances[2]
    assert matched_distance(values, values + 0.5, patches=20, seed=1) == distances[2]


def make_songs(rng, styles, songs=6, patches=8):
    features, names = {}, {}
    for style in range(styles):
        centre = 2 * rng.normal(size=6)
        for song in range(songs):
            features[f"{style}-{song}"] = draw(rng, patches, mean=centre + 0.2 * rng.normal(size=6))
            names[f"{style}-{song}"] = f"style {style}"
    return features, names


def test_anchors_tell_halves_of_a_style_from_other_styles():
    features, styles = make_songs(np.random.default_rng(0), 3)
    anchors = measure_anchors(features, styles, most_patches=1000, seed=0)
    assert anchors is not None and anchors.patches == 24 and len(anchors.styles) == 3
    assert anchors.other_style > 3 * anchors.same_style
    assert anchors.same_style < anchors.same_corpus * 2 < anchors.other_style * 2
    fewer = measure_anchors(features, styles, most_patches=10, seed=0)
    assert fewer is not None and fewer.patches == 10 and fewer.same_style > anchors.same_style  # the bias
    assert set(anchors.figures()) >= {"frechet_same_style", "frechet_other_style", "frechet_patches"}


def test_without_two_styles_of_four_songs_there_are_no_anchors():
    features, styles = make_songs(np.random.default_rng(0), 1)
    assert measure_anchors(features, styles, most_patches=10, seed=0) is None
    features, styles = make_songs(np.random.default_rng(0), 3, songs=3)
    assert measure_anchors(features, styles, most_patches=10, seed=0) is None
