import math

import numpy as np
import pyloudnorm
import pytest
import torch

from duotok.recipes.accompany.mix import PEAK_LIMIT, join_prefix, mix_down
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.loudness import measure_loudness


def noise(seconds: float, level: float = 0.1, seed: int = 0) -> torch.Tensor:
    samples = round(seconds * SAMPLE_RATE_HZ)
    return level * torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))


def test_a_full_scale_sine_has_the_level_of_the_standard():
    times = torch.arange(20 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    assert measure_loudness(torch.sin(2 * torch.pi * 997 * times)[None]) == pytest.approx(-3.01, abs=0.02)


def test_gated_loudness_is_that_of_pyloudnorm():
    wave = noise(25.3)
    wave[:, : 6 * SAMPLE_RATE_HZ] *= 0.01
    wave[0] *= 0.5
    meter = pyloudnorm.Meter(SAMPLE_RATE_HZ, filter_class="DeMan")
    assert measure_loudness(wave) == pytest.approx(meter.integrated_loudness(wave.numpy().T), abs=0.02)


def test_short_and_silent_waves_have_a_level():
    assert measure_loudness(noise(0.3)) == pytest.approx(measure_loudness(noise(5.0)), abs=0.5)
    assert measure_loudness(torch.zeros(2, SAMPLE_RATE_HZ)) == -math.inf
    assert measure_loudness(torch.zeros(2, 0)) == -math.inf


@pytest.mark.parametrize("level", [0.001, 0.05, 0.9])
def test_the_accompaniment_follows_the_vocal(level):
    vocal, band = noise(3.0, 0.03), noise(3.0, level, seed=1)
    result = mix_down(vocal, band, accompaniment_db=-2.0)
    assert result.accompaniment_lufs == pytest.approx(result.vocal_lufs - 2.0, abs=0.01)
    # Only the last quarter of a second fades.
    before = result.accompaniment[:, :-12_000]
    assert measure_loudness(before) == pytest.approx(result.accompaniment_lufs, abs=0.05)
    assert torch.allclose(before / before[0, 0], band[:, :-12_000] / band[0, 0], rtol=1e-4)
    assert not result.accompaniment[:, -1].any()
    assert torch.allclose(result.mix, vocal + result.accompaniment, atol=1e-6)
    assert result.mix_gain_db == 0.0


def test_a_loud_mix_is_turned_down_not_clipped():
    vocal = noise(3.0, 0.3)
    vocal /= vocal.abs().max()
    result = mix_down(vocal.clone(), noise(3.0, 0.1, seed=1), accompaniment_db=0.0)
    for wave in (result.mix, result.accompaniment):
        assert float(wave.abs().max()) <= PEAK_LIMIT + 1e-6
        assert int((wave.abs() > 0.97).sum()) < 3  # a clipped wave would have many samples there
    assert result.mix_gain_db < 0
    rest = result.mix / 10 ** (result.mix_gain_db / 20) - vocal
    correlation = np.corrcoef(rest.flatten(), result.accompaniment.flatten())[0, 1]
    assert correlation > 0.999


def test_a_silent_accompaniment_stays_silent():
    vocal = noise(1.0, 0.1)
    result = mix_down(vocal, torch.zeros_like(vocal), accompaniment_db=0.0)
    assert not result.accompaniment.any()
    assert result.accompaniment_lufs == -math.inf
    assert torch.equal(result.mix, vocal)


def test_what_follows_a_given_start_is_as_loud_and_joined_without_a_step():
    times = torch.arange(4 * SAMPLE_RATE_HZ) / SAMPLE_RATE_HZ
    given = 0.3 * torch.sin(2 * torch.pi * 220 * times[: 2 * SAMPLE_RATE_HZ + 33]).repeat(2, 1)
    band = 0.05 * torch.sin(2 * torch.pi * 330 * times).repeat(2, 1)
    joined, joint = band.clone(), given.shape[1]
    join_prefix(given, joined)
    assert torch.equal(joined[:, :joint], given) and joined.shape == band.shape
    before, after = joined[:, joint - SAMPLE_RATE_HZ : joint], joined[:, joint : joint + SAMPLE_RATE_HZ]
    assert measure_loudness(after) == pytest.approx(measure_loudness(before), abs=0.1)
    assert float(joined.diff().abs().max()) < 2.5 * float(given.diff().abs().max())
    faded = joint + round(0.05 * SAMPLE_RATE_HZ)
    gain = joined[:, faded:].norm() / band[:, faded:].norm()
    assert torch.allclose(joined[:, faded:], gain * band[:, faded:], atol=1e-4)
    silent = band.clone()
    join_prefix(torch.zeros_like(given), silent)
    assert torch.equal(silent[:, faded:], band[:, faded:])  # silence has no level to follow
