"""Distances of sets of sounds have their textbook values; the tagger hears as musicnn's own network does."""

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm

from duotok.recipes.evaluation.distances import (
    MusicFeatures,
    compare_codes,
    compare_sets,
    compare_styles,
    frechet_distance,
    kernel_distance,
    matched_distance,
    measure_anchors,
)


@pytest.fixture(scope="module")
def network() -> MusicFeatures:
    return MusicFeatures.from_pretrained()


def test_patches_are_of_three_seconds_and_heard_on_their_own(network):
    times = torch.arange(48_000 * 7) / 48_000
    tone = 0.1 * torch.sin(2 * torch.pi * 440 * times).repeat(2, 1)
    features = network.of_wave(tone)
    assert features.shape == (2, 200) and bool(torch.isfinite(features).all())  # 7 s hold two patches
    # One that is too short is continued by silence.
    assert torch.allclose(network.of_wave(tone[:, : 48_000 * 4])[0], features[0], atol=1e-3)
    assert network.of_wave(tone[:, :48_000]).shape == (1, 200)
    assert not torch.allclose(network.of_wave(0 * tone)[0], features[0], atol=0.1)


def test_features_are_those_of_the_package(network):
    """Against the full-precision weights of musicnn 0.1.0, read out of its TensorFlow checkpoint."""
    times = torch.arange(3 * 48_000) / 48_000
    chord = sum(0.1 * torch.sin(2 * torch.pi * hertz * times) for hertz in (262, 330, 392))
    features = network.of_wave((chord * (1 + torch.sin(4 * torch.pi * times)) / 2)[None])[0]
    expected = [-0.07995, -0.03288, -0.09226, -0.18606, -0.07870, 0.44959]
    assert features[:6].tolist() == pytest.approx(expected, abs=5e-3)
    assert float(features.norm()) == pytest.approx(8.5104, rel=2e-3)


def test_the_kernel_distance_is_unbiased_and_that_of_the_formula():
    rng = np.random.default_rng(0)
    alike = [kernel_distance(draw(rng, 12), draw(rng, 20)) for _ in range(300)]
    assert abs(np.mean(alike)) < 3 * np.std(alike) / 300**0.5  # no bias, however few there are
    assert min(alike) < 0
    real, found = draw(rng, 3), draw(rng, 4, mean=1.0)
    scale = np.sqrt(np.mean(real**2))

    def kernel(first, second):
        return (np.dot(first, second) / scale**2 / 6 + 1) ** 3

    within = [
        np.mean([kernel(values[i], values[j]) for i in range(n) for j in range(n) if i != j])
        for values, n in ((real, 3), (found, 4))
    ]
    across = np.mean([kernel(one, other) for one in real for other in found])
    assert kernel_distance(real, found) == pytest.approx(1000 * (sum(within) - 2 * across))
    assert kernel_distance(5 * real, 5 * found) == pytest.approx(kernel_distance(real, found))


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
    wider = 3 * (values - values.mean(0)) + values.mean(0)
    assert frechet_distance(values, wider) == pytest.approx(4 * spread)
    # A constant has no covariance.
    assert frechet_distance(values, np.tile(values.mean(0), (5, 1))) == pytest.approx(spread)
    few, others = draw(rng, 5, features=50), draw(rng, 5, features=50)  # fewer samples than features
    assert abs(frechet_distance(few, few)) < 1e-9 and frechet_distance(few, others) > 1


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
    for few in ({"styles": 1}, {"styles": 3, "songs": 3}):  # without two styles of four songs there are none
        assert measure_anchors(*make_songs(np.random.default_rng(0), **few), most_patches=10, seed=0) is None


def test_a_collapsed_set_scores_as_collapsed_and_a_permuted_one_as_itself():
    rng = np.random.default_rng(0)
    songs = [draw(rng, 4, mean=rng.normal(size=6)) for _ in range(12)]
    bands = np.concatenate(songs)
    own, permuted, collapsed = (
        compare_sets(bands, songs, found, seed=0) for found in (songs, songs[::-1], songs[:1] * 12)
    )
    assert permuted == pytest.approx(own, abs=1e-9) and own["spread"] == 1
    assert own["frechet_standardized"] == pytest.approx(0, abs=1e-9)
    assert collapsed["spread"] == 0
    for distance in ("kernel_distance", "frechet_standardized"):
        assert collapsed[distance] > own[distance] + 1
    codes = [torch.from_numpy(rng.integers(0, 50, 100)) for _ in range(6)]
    assert compare_codes(codes, codes[::-1]) == {"entropy": 1.0, "distinct_4_grams": 1.0}
    same = compare_codes(codes, codes[:1] * 6)
    assert same["distinct_4_grams"] == pytest.approx(1 / 6, abs=0.01) and 0.8 < same["entropy"] < 1
    held = compare_codes(codes, [torch.full((100,), int(song[0])) for song in codes])
    assert held["entropy"] < 0.5 and held["distinct_4_grams"] < 0.02
    longer = [torch.cat([song, song + 50]) for song in codes]  # only what both have is compared
    assert compare_codes(codes, longer) == compare_codes(longer, codes) == compare_codes(codes, codes)


def test_halves_of_the_styles_are_further_apart_than_of_the_songs():
    features, styles = make_songs(np.random.default_rng(0), 4)
    found = compare_styles(features, styles, patches=40, seed=0)
    mixed = {name: f"style {number % 4}" for number, name in enumerate(styles)}
    other = compare_styles(features, mixed, patches=40, seed=0)
    assert all(found[name] > 2 * other[name] for name in found)
    assert compare_styles(features, dict.fromkeys(styles, "one"), patches=40, seed=0) == {}
