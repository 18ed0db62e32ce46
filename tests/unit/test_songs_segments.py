"""Cuts: 5 to 30 s, whole sentences only, instrumental ones without a voice."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.recipes.corpus.songs.segments import (
    SegmentConfig,
    Sentence,
    join_spans,
    overlap_seconds,
    plan_segments,
)
from duotok.tokenizer.common.errors import ConfigError

CONFIG = SegmentConfig()


def test_sentences_are_joined_up_to_the_longest_cut():
    sentences = [Sentence(10 + 4 * k, 13 + 4 * k, f"line {k}") for k in range(12)]
    voice = [(each.start, each.end) for each in sentences]
    segments = plan_segments(80.0, sentences, voice, CONFIG)
    sung = [each for each in segments if each.lines]
    assert [len(each.lines) for each in sung] == [7, 5]
    assert [line for each in sung for line in each.lines] == sentences
    instrumental = [each for each in segments if not each.lines]
    assert [(each.start, each.end) for each in instrumental] == [
        (0.0, pytest.approx(9.75)),
        (pytest.approx(57.25), 80.0),
    ]


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


def test_a_last_line_without_end_ends_with_the_voice():
    segments = plan_segments(60.0, [Sentence(10.0, 60.0, "last")], [(10.5, 16.0)], CONFIG)
    (sung,) = [each for each in segments if each.lines]
    assert sung.lines == (Sentence(10.5, 16.0, "last"),)


def test_a_short_sentence_gets_the_silence_around_it():
    segments = plan_segments(12.0, [Sentence(0.5, 2.0, "hey")], [(0.5, 2.0)], CONFIG)
    assert (segments[0].start, segments[0].end) == (0.0, 5.0)
    assert (segments[1].start, segments[1].end) == (5.0, 12.0)


@pytest.mark.parametrize(("shortest", "longest"), [(0.0, 30.0), (5.0, 8.0), (float("nan"), 30.0)])
def test_impossible_lengths_are_refused(shortest: float, longest: float):
    with pytest.raises(ConfigError, match="shortest_seconds"):
        SegmentConfig(shortest_seconds=shortest, longest_seconds=longest)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10_000), st.floats(5.0, 400.0), st.booleans())
def test_cuts_keep_their_promises(seed: int, seconds: float, has_words: bool):
    rng = np.random.default_rng(seed)
    times = np.sort(rng.uniform(0, seconds, 2 * rng.integers(0, 20)))
    voice = join_spans(
        [(float(start), float(end)) for start, end in zip(times[::2], times[1::2], strict=True)]
    )
    sentences = (
        [Sentence(start, end, "la") for start, end in voice if rng.random() < 0.7] if has_words else []
    )
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
