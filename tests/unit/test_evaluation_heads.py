"""Measures of the separator and of the lyric head, by hand."""

import math

import pytest
import torch

from duotok.recipes.evaluation.lyrics_part import edit_distance
from duotok.recipes.evaluation.separation_part import improvements, si_sdr


def test_si_sdr_of_known_noise_whatever_the_gain():
    generator = torch.Generator().manual_seed(0)
    target, noise = torch.randn(2, 48_000, generator=generator), torch.randn(2, 48_000, generator=generator)
    noise -= target * (noise * target).sum() / target.square().sum()  # nothing of the target in it
    noise *= target.norm() / noise.norm()
    for gain in (0.1, 3.0):
        assert si_sdr(gain * (target + 0.1 * noise), target) == pytest.approx(20, abs=0.05)
    assert si_sdr(noise, target) < -60


def test_improvement_is_over_the_mix_and_leaves_silent_stems_out():
    generator = torch.Generator().manual_seed(1)
    truth = {stem: torch.randn(2, 24_000, generator=generator) for stem in ("vocal", "drums")}
    truth["bass"] = torch.zeros(2, 24_000)
    mix = sum(truth.values())
    found = {"vocal": truth["vocal"] + 0.1 * truth["drums"], "drums": mix, "bass": mix}
    gains = improvements(found, truth, mix)
    assert set(gains) == {"vocal", "drums"}
    assert gains["vocal"] == pytest.approx(20, abs=0.3) and gains["drums"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    ("found", "wanted", "distance"),
    [([], [1, 2, 3], 3), ([1, 2, 3], [1, 2, 3], 0), ([1, 3], [1, 2, 3], 1), ([4, 1, 2], [1, 2, 3], 2)],
)
def test_edit_distance(found, wanted, distance):
    assert edit_distance(found, wanted) == distance
    assert math.isclose(edit_distance(wanted, found), distance)
