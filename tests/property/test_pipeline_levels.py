import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from duotok.recipes.accompany.mix import PEAK_LIMIT, mix_down
from duotok.tokenizer.common.loudness import measure_loudness
from duotok.tokenizer.music.harmony import estimate_chords
from duotok.tokenizer.music.labels import CHORD_NAMES


def noise(samples: int, level: float, seed: int) -> torch.Tensor:
    return level * torch.randn(2, samples, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=25, deadline=None)
@given(
    samples=st.integers(1, 100_000),
    vocal_db=st.floats(-70, 0),
    band_db=st.floats(-90, 30),
    over_db=st.floats(-20, 12),
    seed=st.integers(0, 100),
)
def test_whatever_the_levels_nothing_reaches_full_scale(samples, vocal_db, band_db, over_db, seed):
    vocal, band = noise(samples, 10 ** (vocal_db / 20), seed), noise(samples, 10 ** (band_db / 20), seed + 1)
    result = mix_down(vocal, band, accompaniment_db=over_db)
    for wave in (result.accompaniment, result.mix):
        assert wave.shape == (2, samples)
        assert float(wave.abs().max()) <= PEAK_LIMIT * (1 + 1e-5)
    assert result.mix_gain_db <= 0
    assert not result.accompaniment[:, -1].any()


@settings(max_examples=25, deadline=None)
@given(samples=st.integers(4_800, 200_000), gain_db=st.floats(-40, 40), seed=st.integers(0, 100))
def test_loudness_moves_with_the_gain(samples, gain_db, seed):
    wave = noise(samples, 0.1, seed)
    moved = measure_loudness(wave * 10 ** (gain_db / 20)) - measure_loudness(wave)
    assert math.isclose(moved, gain_db, abs_tol=0.05)


@settings(max_examples=50, deadline=None)
@given(
    chroma=hnp.arrays("float64", st.tuples(st.integers(1, 400), st.just(12)), elements=st.floats(0, 1)),
    rate_hz=st.sampled_from([7.0, 20.0, 50.0]),
)
def test_chords_cover_the_song_without_gaps(chroma, rate_hz):
    chords = estimate_chords(chroma, rate_hz)
    assert chords[0][0] == 0.0
    assert math.isclose(chords[-1][1], len(chroma) / rate_hz)
    for (_, end, name), (start, _, following) in zip(chords[:-1], chords[1:], strict=True):
        assert end == start
        assert name != following
    assert {name for _, _, name in chords} <= set(CHORD_NAMES)
