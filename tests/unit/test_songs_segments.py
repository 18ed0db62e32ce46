"""Singing is found where it is, and cuts end where sentences do."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.recipes.corpus.songs.segments import (
    HarmonicDetector,
    SegmentConfig,
    Sentence,
    frame_levels,
    join_spans,
    loud_level,
    overlap_seconds,
    plan_segments,
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


def test_noise_silence_and_bleed_far_below_the_mix_are_no_voice(phrase: torch.Tensor):
    noise = 0.1 * torch.randn(phrase.shape, generator=torch.Generator().manual_seed(0))
    for blocks in ([noise], [torch.zeros_like(phrase)], []):
        assert HarmonicDetector().find(blocks) == []
    mix_db = loud_level(frame_levels(phrase))
    assert HarmonicDetector().find([0.05 * phrase], mix_db) == []
    assert HarmonicDetector().find([0.2 * phrase], mix_db) != []


def test_spans_join_over_short_gaps_only():
    assert join_spans([(0.0, 1.0), (1.2, 2.0), (3.0, 3.1), (4.0, 5.0)]) == [(0.0, 2.0), (4.0, 5.0)]


CONFIG = SegmentConfig()


def test_sentences_are_joined_up_to_the_longest_cut():
    sentences = [Sentence(10 + 4 * k, 13 + 4 * k, f"line {k}") for k in range(12)]
    voice = [(each.start, each.end) for each in sentences]
    segments = plan_segments(80.0, sentences, voice, CONFIG)
    sung = [each for each in segments if each.lines]
    assert [len(each.lines) for each in sung] == [7, 5]
    assert [line for each in sung for line in each.lines] == sentences
    instrumental = [time for each in segments if not each.lines for time in (each.start, each.end)]
    assert instrumental == pytest.approx([0.0, 9.75, 57.25, 80.0])


def test_without_a_transcript_the_voice_is_cut_at_its_pauses():
    voice = [(1.0, 8.0), (9.0, 20.0), (22.0, 35.0)]
    segments = plan_segments(36.0, [], voice, CONFIG)
    assert [[line.text for line in each.lines] for each in segments] == [["", ""], [""]]
    assert 20.0 < segments[0].end <= 21.0 <= segments[1].start < 22.0


def test_known_and_unknown_words_are_never_in_one_cut():
    sentences = [Sentence(0.0, 10.0, "known")]
    segments = plan_segments(30.0, sentences, [(0.0, 10.0), (11.0, 20.0)], CONFIG)
    assert [[line.text for line in each.lines] for each in segments] == [["known"], [""], []]


def test_words_that_nobody_is_heard_singing_are_neither_sung_nor_instrumental():
    segments = plan_segments(40.0, [Sentence(10.0, 20.0, "ghost")], [], CONFIG)
    assert [(each.start, each.end, each.lines) for each in segments] == [(0.0, 10.0, ()), (20.0, 40.0, ())]
    # A last line without end ends with the voice.
    segments = plan_segments(60.0, [Sentence(10.0, 60.0, "last")], [(10.5, 16.0)], CONFIG)
    (sung,) = [each for each in segments if each.lines]
    assert sung.lines == (Sentence(10.5, 16.0, "last"),)


def test_a_short_sentence_gets_the_silence_around_it():
    segments = plan_segments(12.0, [Sentence(0.5, 2.0, "hey")], [(0.5, 2.0)], CONFIG)
    assert (segments[0].start, segments[0].end) == (0.0, 5.0)
    assert (segments[1].start, segments[1].end) == (5.0, 12.0)


def test_impossible_lengths_are_refused():
    for shortest, longest in ((0.0, 30.0), (5.0, 8.0), (float("nan"), 30.0)):
        with pytest.raises(ConfigError, match="shortest_seconds"):
            SegmentConfig(shortest_seconds=shortest, longest_seconds=longest)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(5.0, 400.0), st.booleans())
def test_cuts_keep_their_promises(seed: int, seconds: float, has_words: bool):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, seconds, 2 * rng.integers(0, 20)))
    voice = join_spans([(float(a), float(b)) for a, b in zip(times[::2], times[1::2], strict=True)])
    worded = [span for span in voice if has_words and rng.random() < 0.7]
    sentences = [Sentence(start, end, "la") for start, end in worded]
    segments = plan_segments(seconds, sentences, voice, CONFIG)
    for before, after in zip(segments, segments[1:], strict=False):
        assert before.end <= after.start + 1e-9
    for each in segments:
        assert 0 <= each.start and each.end <= seconds + 1e-9
        assert 5.0 - 1e-6 <= each.seconds <= 30.0 + 1e-6
        assert len({bool(line.text) for line in each.lines}) <= 1
        assert all(each.start - 1e-9 <= line.start and line.end <= each.end + 1e-9 for line in each.lines)
        if not each.lines:
            assert overlap_seconds(voice, each.start, each.end) < 1e-6
