"""For any stems: the mix is their exact sum and nothing clips."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from duotok.recipes.corpus.popband.rendering import finish

SAMPLES = 64
VALUES = st.floats(-100, 100, width=32, allow_nan=False)


@settings(deadline=None, max_examples=60)
@given(
    arrays.arrays(np.float32, (1, SAMPLES), elements=VALUES),
    arrays.arrays(np.float32, (2, SAMPLES), elements=VALUES),
    arrays.arrays(np.float32, (1, SAMPLES), elements=VALUES),
    arrays.arrays(np.float32, (2, SAMPLES), elements=VALUES),
)
def test_stems_sum_to_the_mix_sample_by_sample(vocal, drums, bass, other):
    mix = finish({"vocal": vocal, "drums": drums, "bass": bass, "other": other})
    total = sum(np.broadcast_to(wave.astype(int), (SAMPLES, 2)) for wave in mix.stems.values())
    assert np.array_equal(total, mix.mix)
    assert mix.mix.dtype == np.int16
    assert max(np.abs(wave.astype(int)).max() for wave in (*mix.stems.values(), mix.mix)) <= 32_767
