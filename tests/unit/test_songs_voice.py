"""The detector of singing finds the notes, and takes neither noise nor bleed for a voice."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.songs.segments import (
    HarmonicDetector,
    SileroDetector,
    frame_levels,
    join_spans,
    loud_level,
    open_detector,
    overlap_seconds,
)
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError


@pytest.fixture(scope="module")
def phrase(make_singing: Callable[..., np.ndarray]) -> torch.Tensor:
    """12 s in stereo: silence, singing from 3 to 7 s, silence."""
    wave = np.zeros((12 * SAMPLE_RATE_HZ, 2), np.float32)
    wave[3 * SAMPLE_RATE_HZ : 7 * SAMPLE_RATE_HZ] = make_singing(4.0, channels=2)
    return torch.from_numpy(wave.T.copy())


def test_singing_is_found_where_it_is_whatever_the_blocks(phrase: torch.Tensor):
    spans = HarmonicDetector().find([phrase])
    assert len(spans) == 1 and spans[0] == (pytest.approx(3.0, abs=0.1), pytest.approx(6.9, abs=0.15))
    assert HarmonicDetector().find(phrase.split(70_001, dim=1)) == spans


def test_noise_and_silence_are_no_voice(phrase: torch.Tensor):
    noise = 0.1 * torch.randn(phrase.shape, generator=torch.Generator().manual_seed(0))
    assert HarmonicDetector().find([noise]) == []
    assert HarmonicDetector().find([torch.zeros_like(phrase)]) == []
    assert HarmonicDetector().find([]) == []


def test_bleed_far_below_the_mix_is_no_voice(phrase: torch.Tensor):
    mix_db = loud_level(frame_levels(phrase))
    assert HarmonicDetector().find([0.05 * phrase], mix_db) == []
    assert HarmonicDetector().find([0.2 * phrase], mix_db) != []


def test_silero_runs_on_its_own_weights_and_hears_no_silence(phrase: torch.Tensor):
    pytest.importorskip("silero_vad")
    threads = torch.get_num_threads()
    detector = open_detector("silero")
    assert isinstance(detector, SileroDetector) and torch.get_num_threads() == threads
    spans = detector.find(phrase.split(70_001, dim=1))
    assert overlap_seconds(spans, 0.0, 2.5) == 0
    assert detector.find([torch.zeros_like(phrase)]) == []


def test_spans_join_over_short_gaps_only():
    assert join_spans([(0.0, 1.0), (1.2, 2.0), (3.0, 3.1), (4.0, 5.0)]) == [(0.0, 2.0), (4.0, 5.0)]


def test_an_unknown_detector_is_refused():
    with pytest.raises(ConfigError, match="harmonic"):
        open_detector("ears")
