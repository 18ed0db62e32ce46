"""Where somebody sings in a vocal stem, and cuts of 5 to 30 s at sentence boundaries (P C.2).

Singing is found by level and harmonicity, in blocks: a recording of hours needs no more memory than one of
minutes.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.ndimage import median_filter, uniform_filter1d
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, resample_blocks
from duotok.tokenizer.common.errors import ConfigError

RATE_HZ = 16_000
JOIN_SECONDS = 0.3  # shorter gaps belong to the singing: consonants, short breaths
SHORTEST_VOICE_SECONDS = 0.25
FLOOR_DB = -55.0  # full scale = 0: below this nothing is a voice, whatever its shape
BELOW_LOUDEST_DB = 30.0  # singing is less than this below the loudest singing
BELOW_MIX_DB = 22.0  # and less than this below the loud parts of the mix; bleed of a separator lies lower
MARGIN_SECONDS = 0.25  # kept around a sung cut where nothing else is sung
LONGEST_GAP_SECONDS = 3.0  # a longer break between two sentences parts two cuts
LEAST_VOICE = 0.1  # share of a sentence in which a voice is heard; below it the transcript is wrong there
LONGEST_GUESS_SECONDS = 10.0  # of an unheard sentence, for its end may only be where the next one begins
SHORTEST_UNKNOWN_SECONDS = 0.8  # shorter singing outside of the sentences is their slack

Spans = list[tuple[float, float]]  # start and end in seconds, in order, apart


class Sentence(NamedTuple):
    """One sung line."""

    start: float  # seconds
    end: float  # seconds; infinite where the file does not say
    text: str  # "" = sung, the words are unknown


class HarmonicDetector:
    """Voice = loud enough against the loudest parts, and harmonic around there.

    Of the sung time of five PopBand validation songs it found 0.99 (silero-vad: 0.37), and nothing with only
    a separator's bleed in the stem.
    """

    frame_samples = 1_024  # 64 ms: three periods of the lowest note
    hop_samples = 320  # 20 ms
    lowest_hz, highest_hz = 65.0, 1_000.0
    least_harmonicity = 0.5  # autocorrelation at the pitch period; 1 = periodic, noise stays below 0.3
    context_frames = 25  # half a second, over which breath and consonants do not count

    def find(self, blocks: Iterable[Tensor], mix_db: float = FLOOR_DB) -> Spans:
        """blocks [2, samples] at 48 kHz of a vocal stem, in order -> active spans in seconds.

        mix_db: level of the loud parts of the song's mix (`loud_level`), full scale = 0.
        """
        levels, harmonicity = [np.zeros(0)], [np.zeros(0)]
        for frames in self._frames(blocks):
            levels.append(10 * np.log10(np.mean(np.square(frames), axis=1) + 1e-12))
            harmonicity.append(self._harmonicity(frames))
        level = np.concatenate(levels)
        if not level.size or level.max() < FLOOR_DB:
            return []
        loudest = float(np.percentile(level[level > FLOOR_DB], 95))
        threshold = max(FLOOR_DB, loudest - BELOW_LOUDEST_DB, mix_db - BELOW_MIX_DB)
        loud = level > threshold
        # Harmonic sound must make up a part of the energy around a frame, not be in every frame.
        power = np.where(loud, 10 ** (level / 10), 0.0)
        around = uniform_filter1d(power, self.context_frames) + 1e-12
        sung = uniform_filter1d(power * np.concatenate(harmonicity), self.context_frames) / around
        active = median_filter(loud & (sung > self.least_harmonicity), 5)
        offset = self.frame_samples / 2 - self.hop_samples / 2
        return join_spans(spans_of(active, self.hop_samples / RATE_HZ, offset / RATE_HZ))

    def _frames(self, blocks: Iterable[Tensor]) -> Iterable[np.ndarray]:
        """Overlapping frames [frames, frame_samples] that run on across the blocks."""
        rest = np.zeros(0, np.float32)
        for wave in mono_blocks(blocks):
            rest = np.concatenate([rest, wave])
            if len(rest) < self.frame_samples:
                continue
            view = np.lib.stride_tricks.sliding_window_view(rest, self.frame_samples)[:: self.hop_samples]
            yield view
            rest = rest[len(view) * self.hop_samples :]

    def _harmonicity(self, frames: np.ndarray) -> np.ndarray:
        """Largest normalized autocorrelation [frames] over the lags of sung pitches (Boersma 1993)."""
        size = 2 * self.frame_samples
        window = np.hanning(self.frame_samples).astype(np.float32)
        spectrum = np.fft.rfft((frames - frames.mean(axis=1, keepdims=True)) * window, size)
        correlation = np.fft.irfft(np.square(np.abs(spectrum)), size)
        bias = np.fft.irfft(np.square(np.abs(np.fft.rfft(window, size))), size)
        lags = np.arange(int(RATE_HZ / self.highest_hz), int(RATE_HZ / self.lowest_hz) + 1)
        ratio = correlation[:, lags] / (correlation[:, :1] + 1e-9)
        return np.clip((ratio * bias[0] / bias[lags]).max(axis=1), 0, 1)


def mono_blocks(blocks: Iterable[Tensor]) -> Iterable[np.ndarray]:
    """Blocks [2, samples] at 48 kHz -> blocks [samples] at 16 kHz, resampled through."""
    mono = (wave.mean(dim=0).numpy()[:, None] for wave in blocks)
    return (block[:, 0] for block in resample_blocks(mono, SAMPLE_RATE_HZ, RATE_HZ))


def frame_levels(wave: Tensor) -> np.ndarray:
    """Levels in dB [frames] of every whole 0.1 s of a wave [channels, samples] at 48 kHz, full scale = 0."""
    size = SAMPLE_RATE_HZ // 10
    if wave.shape[-1] < size:
        return np.zeros(0)
    frames = wave.mean(dim=0).unfold(0, size, size)
    return 10 * np.log10(frames.square().mean(dim=1).numpy() + 1e-12)


def loud_level(levels: np.ndarray) -> float:
    """The level in dB that only a twentieth of the sounding frames exceed; FLOOR_DB for silence."""
    sounding = levels[levels > FLOOR_DB]
    return float(np.percentile(sounding, 95)) if sounding.size else FLOOR_DB


def spans_of(active: np.ndarray, step_seconds: float, offset_seconds: float) -> Spans:
    """The runs of true frames as (start, end) in seconds."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], active, [False]]).astype(int)))
    times = np.maximum(0.0, edges * step_seconds + offset_seconds)
    return [(float(start), float(end)) for start, end in zip(times[::2], times[1::2], strict=True)]


def join_spans(spans: Spans, gap_seconds: float = JOIN_SECONDS) -> Spans:
    """Spans joined over short gaps; what is still too short to be sung is dropped."""
    joined: Spans = []
    for start, end in spans:
        if joined and start - joined[-1][1] < gap_seconds:
            joined[-1] = (joined[-1][0], end)
        else:
            joined.append((start, end))
    return [(start, end) for start, end in joined if end - start >= SHORTEST_VOICE_SECONDS]


def overlap_seconds(spans: Spans, start: float, end: float) -> float:
    """Seconds of a stretch that lie inside spans."""
    return sum(max(0.0, min(end, stop) - max(start, begin)) for begin, stop in spans)


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
