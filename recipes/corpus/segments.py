"""Cuts of 5 to 30 s at sentence boundaries: sung ones with their words, and instrumental ones (P C.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from duotok.recipes.corpus.transcripts import Sentence
from duotok.recipes.corpus.voice_activity import Spans, overlap_seconds
from duotok.tokenizer.common.errors import ConfigError

MARGIN_SECONDS = 0.25  # kept around a sung cut where nothing else is sung
LONGEST_GAP_SECONDS = 3.0  # a longer break between two sentences parts two cuts
LEAST_VOICE = 0.1  # share of a sentence in which a voice is heard; below it the transcript is wrong there
LONGEST_GUESS_SECONDS = 10.0  # of an unheard sentence, for its end may only be where the next one begins
SHORTEST_UNKNOWN_SECONDS = 0.8  # shorter singing outside of the sentences is their slack


@dataclass(frozen=True, kw_only=True)
class SegmentConfig:
    """How long a cut may be (P C.2)."""

    shortest_seconds: float = 5.0
    longest_seconds: float = 30.0

    def __post_init__(self) -> None:
        if not 1.0 <= self.shortest_seconds <= self.longest_seconds / 2:
            raise ConfigError(
                "shortest_seconds must be at least 1 and at most half of longest_seconds, got "
                f"{self.shortest_seconds:g} and {self.longest_seconds:g}"
            )


@dataclass(frozen=True, kw_only=True)
class Segment:
    """One stretch of a song; sung if it has lines."""

    start: float  # seconds in the song
    end: float
    lines: tuple[Sentence, ...]  # times in the song; either all have words or none has

    @property
    def seconds(self) -> float:
        """Length."""
        return self.end - self.start


def plan_segments(
    seconds: float, sentences: Sequence[Sentence], voice: Spans, config: SegmentConfig
) -> list[Segment]:
    """Cuts of a song in order of time; none parts a sentence or mixes known and unknown words.

    seconds: length of the song; sentences: of the transcript, apart and inside it; voice: where the detector
    hears singing. What is sung outside of the sentences becomes cuts without words; what is too short for a
    cut together with its surroundings is left out.
    """
    lines = sung_lines(sentences, voice, config.longest_seconds)
    groups = _group(lines, config)
    sung = []
    for index, group in enumerate(groups):
        # Up to the middle of the silence between two groups belongs to each.
        low = (groups[index - 1][-1].end + group[0].start) / 2 if index else 0.0
        high = (group[-1].end + groups[index + 1][0].start) / 2 if index + 1 < len(groups) else seconds
        start, end = _widen(group[0].start, group[-1].end, low, min(high, seconds), config)
        if end - start >= config.shortest_seconds - 1e-6:
            sung.append(Segment(start=start, end=end, lines=tuple(group)))
    # Where the transcript has words and the detector hears nobody, one of them is wrong: neither kind.
    ghosts = [
        (each.start, min(each.end, each.start + LONGEST_GUESS_SECONDS)) for each in unheard(sentences, voice)
    ]
    margins = [(line.start - MARGIN_SECONDS, line.end + MARGIN_SECONDS) for line in lines]
    blocked = sorted([*((each.start, each.end) for each in sung), *margins, *ghosts, *voice])
    return sorted([*sung, *_instrumental(seconds, blocked, config)], key=lambda each: each.start)


def sung_lines(sentences: Sequence[Sentence], voice: Spans, longest_seconds: float) -> list[Sentence]:
    """The sentences trimmed to where a voice is heard, and the rest of the singing as lines without words."""
    lines: list[Sentence] = []
    silent = set(unheard(sentences, voice))
    for each in sentences:
        if each in silent:
            continue
        inside = [(start, end) for start, end in voice if end > each.start and start < each.end]
        start, end = max(each.start, inside[0][0]), min(each.end, inside[-1][1])
        if end - start > longest_seconds:
            continue  # no sentence lasts so long: its singing counts as unknown words
        lines.append(Sentence(start, end, each.text))
    taken = [(line.start, line.end) for line in lines]
    for start, end in voice:
        for begin, stop in _free(start, end, taken):
            if stop - begin >= SHORTEST_UNKNOWN_SECONDS:
                pieces = math.ceil((stop - begin) / longest_seconds)
                step = (stop - begin) / pieces
                lines += [Sentence(begin + k * step, begin + (k + 1) * step, "") for k in range(pieces)]
    return sorted(lines)


def unheard(sentences: Sequence[Sentence], voice: Spans) -> list[Sentence]:
    """The sentences in which no voice was found."""
    return [
        each
        for each in sentences
        if overlap_seconds(voice, each.start, each.end)
        < LEAST_VOICE * min(each.end - each.start, LONGEST_GUESS_SECONDS)
    ]


def _group(lines: Sequence[Sentence], config: SegmentConfig) -> list[list[Sentence]]:
    """Runs of neighbouring lines that fit into one cut."""
    groups: list[list[Sentence]] = []
    for line in lines:
        last = groups[-1] if groups else None
        if (
            last is not None
            and bool(line.text) == bool(last[-1].text)
            and line.start - last[-1].end <= LONGEST_GAP_SECONDS
            and line.end - last[0].start <= config.longest_seconds
        ):
            last.append(line)
        else:
            groups.append([line])
    return groups


def _widen(start: float, end: float, low: float, high: float, config: SegmentConfig) -> tuple[float, float]:
    """A little air on both sides, more where the cut would be too short, inside of low and high."""
    air = max(MARGIN_SECONDS, (config.shortest_seconds - (end - start)) / 2)
    air = min(air, (config.longest_seconds - (end - start)) / 2)
    left, right = min(air, start - low), min(air, high - end)
    missing = config.shortest_seconds - (end - start) - left - right
    if missing > 0:
        right = min(right + missing, high - end)
        missing = config.shortest_seconds - (end - start) - left - right
        left = min(left + max(0.0, missing), start - low)
    return start - max(0.0, left), end + max(0.0, right)


def _instrumental(seconds: float, blocked: Spans, config: SegmentConfig) -> list[Segment]:
    segments = []
    for start, end in _free(0.0, seconds, blocked):
        if end - start < config.shortest_seconds:
            continue
        pieces = math.ceil((end - start) / config.longest_seconds - 1e-9)
        step = (end - start) / pieces
        segments += [
            Segment(start=start + k * step, end=start + (k + 1) * step, lines=()) for k in range(pieces)
        ]
    return segments


def _free(start: float, end: float, taken: Spans) -> Spans:
    """What is left of a stretch outside of the taken spans, which are in order."""
    free, position = [], start
    for begin, stop in taken:
        if begin > position:
            free.append((position, min(begin, end)))
        position = max(position, stop)
        if position >= end:
            break
    else:
        free.append((position, end))
    return [(begin, stop) for begin, stop in free if stop > begin]
