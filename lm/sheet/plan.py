"""A plan of the whole song, made before the first note is played: time, keys, sections, chords.

What single frames say of bars and chords is weak, and nothing where nobody sings; a song helps itself. It has
one tempo or a smooth curve of it (`timeline`), one key unless a change is earned, chords that move as they do
in that key (`progressions`), and passages that come again: bars whose singing is alike are heard as one
(M. Mauch et al., Using Musical Structure to Enhance Automatic Chord Transcription, 2009), and where nobody
sings, the nearest passage is played once more.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ...tokenizer.music.harmony import find_path
from ...tokenizer.music.labels import NO_CHORD
from ...tokenizer.music.melody import PARTS, default_melody_reader
from ...tokenizer.music.progressions import load_progressions
from .columns import BEATS_PER_BAR, CHORD, CHORD_TRUST, PLACE, PLACE_TRUST, unknown_sheet
from .reader import measure_trust
from .timeline import (
    BAR_SECONDS,
    EVIDENCE,
    TimeLine,
    find_other_tempo,
    find_time_line,
    find_two_tempi,
)

_KEY_BLOCK_SECONDS = 2.0
_KEY_COST = 300.0  # nats for a change of key: some thirty bars of singing must be for it
_KEY_CHORDS = 0.5  # weight of what the chords say of the key beside what is sung
_CHORD_EVIDENCE = 0.1  # of a frame's log-probabilities
_PACE_EVIDENCE = 4.0  # of what the melody says of the tempo in a second
# Less of a song says too little: chords and tempo by melody cost the band's beat in excerpts of 12 to 20 s.
_MELODY_SECONDS = 60.0
_MELODY_EVIDENCE = 2.0  # of what a beat's melody asks for, which the reader of the voice has not learned
# Nats for a change of chord at each beat of the bar, by the number of beats.
_CHANGE_COSTS = {
    2: np.array([0.0, 0.5]),
    3: np.array([0.0, 1.0, 1.0]),
    4: np.array([0.0, 1.0, 0.5, 1.5]),
    6: np.array([0.0, 1.5, 1.5, 0.5, 1.5, 1.5]),
}
_PART_BARS = 4  # of sections
_CHANGE_WEIGHT = 0.5  # of how chords follow each other
_ALIKE, _ALIKE_SHARPNESS = 0.8, 20.0  # cosine of two passages of one melody, and how sharply it is judged
_AGAIN = 0.7  # the same, bar by bar, of a passage that is played again
_REACH_BARS = 2  # to each side, through which passages are compared
_PHRASE_BARS = 8
_SUNG, _HARDLY_SUNG = 0.15, 0.05  # shares of a bar
_LEAST_SUNG_SECONDS = 1.0  # of a song that has a singer
_STEADY_SEMITONES = 0.01  # no voice keeps its pitch like that
_LONG_PAUSE_BARS = 4


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What is heard of a singer, frame by frame."""

    place: np.ndarray  # [frames, PLACES] log-probabilities of the place in the bar
    chord: np.ndarray  # [frames, CHORDS] log-probabilities of the chord
    pitches: np.ndarray  # [k * frames] sung MIDI pitch, NaN where nothing is sung
    rate_hz: float  # frames per second
    given_frames: int = 0  # at the start, in which a band was heard

    @cached_property
    def pitch_classes(self) -> np.ndarray:
        """Share of each frame in which each pitch class is sung [frames, 12]."""
        frames = len(self.place)
        per_frame = max(1, round(len(self.pitches) / max(frames, 1)))
        pitches = self.pitches[: frames * per_frame]
        sung = np.flatnonzero(np.isfinite(pitches))
        shares = np.zeros((frames, 12))
        np.add.at(shares, (sung // per_frame, np.round(pitches[sung]).astype(int) % 12), 1 / per_frame)
        return shares

    def sung_between(self, beats: np.ndarray) -> np.ndarray:
        """Share of each part of the time between beats [n + 1], in frames, that each pitch class is sung.

        [n, PARTS, 12]; the time before the first frame and behind the last is silent.
        """
        count = len(beats) - 1
        times = (np.arange(len(self.pitches)) + 0.5) * len(self.place) / max(len(self.pitches), 1)
        part = np.floor(np.interp(times, beats, np.arange(count + 1)) * PARTS).astype(int)
        part = part.clip(0, count * PARTS - 1)
        sung = np.flatnonzero(np.isfinite(self.pitches))
        shares = np.zeros((count * PARTS, 12))
        np.add.at(shares, (part[sung], np.round(self.pitches[sung]).astype(int) % 12), 1.0)
        lengths = np.bincount(part, minlength=count * PARTS)
        return (shares / np.maximum(lengths, 1)[:, None]).reshape(count, PARTS, 12)

    @property
    def is_long(self) -> bool:
        """Whether there is enough of the song for its melody to be asked."""
        return len(self.place) >= _MELODY_SECONDS * self.rate_hz

    @property
    def has_singer(self) -> bool:
        """Whether anything in it can be a voice: pitched for a while, and not one steady tone."""
        sung = self.pitches[np.isfinite(self.pitches)]
        per_second = len(self.pitches) / max(len(self.place), 1) * self.rate_hz
        if len(sung) < _LEAST_SUNG_SECONDS * per_second:
            return False
        moves = float(np.median(np.abs(np.diff(sung)))) > _STEADY_SEMITONES
        return moves or float(np.ptp(np.percentile(sung, (5, 95)))) > 1


@dataclass(frozen=True, kw_only=True)
class Section:
    """A stretch of the song, from one bar line to another."""

    start: int  # frames
    end: int
    name: str  # intro, verse, chorus, bridge, interlude, ending
    letter: str  # sections of one letter are sung alike; empty where nobody sings


@dataclass(frozen=True, kw_only=True)
class SongPlan:
    """What the band agrees on before it plays."""

    sheet: Tensor  # [frames, COLUMNS]
    again: Tensor  # [frames] the earlier frame that is played again, -1 where something new is
    time_line: TimeLine
    keys: Sequence[tuple[int, int, int]]  # first frame, frame behind the last, key 0-11 major, 12-23 minor
    sections: Sequence[Section]
    other_tempo: tuple[float, float] | None  # half or double, and its share of the evidence; None: was given
    two_tempi: tuple[float, float] | None  # of both halves, where one time line does not do
    has_singer: bool
    sung_beats_per_bar: int | None = None  # the meter that the singer has, where the band plays in another

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line for each thing that the band cannot make sense of."""
        if not self.has_singer:
            return ("no singing heard; the band plays by itself",)
        found = []
        if self.sung_beats_per_bar is not None:
            found.append(
                f"the singing seems to have bars of {self.sung_beats_per_bar} beats; the band knows none of "
                f"these and plays bars of {self.time_line.beats_per_bar}"
            )
        if self.two_tempi is not None:
            first, second = self.two_tempi
            found.append(
                f"the singing has two tempi, {first:.0f} and {second:.0f} BPM, and the band keeps one; cut "
                "the song between them"
            )
        return tuple(found)


def plan_song(
    heard: Heard,
    *,
    tempo_bpm: float | None = None,
    downbeat_seconds: float | None = None,
    key: int | None = None,
    beats_per_bar: int = BEATS_PER_BAR,
) -> SongPlan:
    """Plan a song of one frame or more; what is given is taken as given.

    downbeat_seconds: where a bar begins; key: 0-11 major, 12-23 minor; beats_per_bar: 2, 3, 4 or 6.
    """
    frames, rate_hz = len(heard.place), heard.rate_hz
    line = find_time_line(
        heard.place,
        rate_hz,
        tempo_bpm=tempo_bpm,
        downbeat_seconds=downbeat_seconds,
        beats_per_bar=beats_per_bar,
    )
    keys = np.full(frames, key) if key is not None else _find_keys(heard)
    if heard.is_long and tempo_bpm is None and beats_per_bar == BEATS_PER_BAR:  # others it has not learned
        line = _choose_pace(heard, line, keys, downbeat_seconds)
    bars = _Bars(heard, line)
    chords = _find_chords(heard, bars.share_evidence(), line, keys)
    again = bars.find_again(line)
    for frame in np.flatnonzero(again >= 0):  # in order: what is played again may be played a third time
        chords[frame] = chords[again[frame]]
    places = line.places(frames)
    sheet = unknown_sheet(frames)
    for column, values, told, seconds in (
        (PLACE, places, heard.place, 8.0),
        (CHORD, chords, heard.chord, 2.0),
    ):
        trust = measure_trust(told, values, round(seconds * rate_hz)) * heard.has_singer
        sheet[:, column] = torch.from_numpy(values)
        sheet[:, PLACE_TRUST if column == PLACE else CHORD_TRUST] = torch.from_numpy(trust)
    edges = [0, *(np.flatnonzero(np.diff(keys)) + 1).tolist(), frames]
    return SongPlan(
        sheet=sheet,
        again=torch.from_numpy(again),
        time_line=line,
        keys=[(first, last, int(keys[first])) for first, last in pairwise(edges)],
        sections=bars.name_sections(),
        other_tempo=None if tempo_bpm is not None else find_other_tempo(heard.place, line),
        two_tempi=None if tempo_bpm is not None else find_two_tempi(heard.place, line),
        has_singer=heard.has_singer,
    )


def _find_keys(heard: Heard) -> np.ndarray:
    """Key of each frame [frames] by all that is sung and by the chords that are heard in it."""
    tables, sung = load_progressions(), heard.pitch_classes
    chords = np.exp(heard.chord[:, :NO_CHORD])
    usual = np.log(np.exp(tables.chords).mean(axis=0))
    evidence = sung @ tables.pitches.T
    heard_in = (sung.sum(axis=1) > 0) | (np.arange(len(sung)) < heard.given_frames)
    evidence += _KEY_CHORDS * heard_in[:, None] * (chords @ (tables.chords - usual).T)
    block = max(1, round(_KEY_BLOCK_SECONDS * heard.rate_hz))
    blocks = np.add.reduceat(evidence, np.arange(0, len(evidence), block), axis=0)
    return np.repeat(find_path(blocks, np.full(len(blocks), _KEY_COST)), block)[: len(evidence)]


def _choose_pace(heard: Heard, line: TimeLine, keys: np.ndarray, downbeat_seconds: float | None) -> TimeLine:
    """The time line itself, or one of half or double the tempo, by evidence and melody."""
    frames, bar_seconds = len(keys), BEATS_PER_BAR * 60 / line.tempo_bpm
    lines = [line] + [
        find_time_line(
            heard.place, heard.rate_hz, tempo_bpm=factor * line.tempo_bpm, downbeat_seconds=downbeat_seconds
        )
        for factor in (0.5, 2.0)
        if BAR_SECONDS[0] <= bar_seconds / factor <= BAR_SECONDS[1]
    ]
    scores = []
    for each in lines:
        told = EVIDENCE * heard.place[np.arange(frames), each.places(frames)].sum()
        middles = ((each.beats[:-1] + each.beats[1:]) / 2).astype(int).clip(0, frames - 1)
        melody = heard.sung_between(each.beats)
        *_, paces = default_melody_reader().judge(melody, keys[middles], BEATS_PER_BAR)
        scores.append(told + _PACE_EVIDENCE * frames / heard.rate_hz * paces[:, 0].mean())
    return lines[int(np.argmax(scores))]


def _find_chords(heard: Heard, evidence: np.ndarray, line: TimeLine, keys: np.ndarray) -> np.ndarray:
    """Chord of each frame [frames] by evidence [frames, NO_CHORD] in nats and by melody; new at beats."""
    beats = line.beats_of(len(evidence)).clip(0)
    starts = np.flatnonzero(np.diff(beats, prepend=beats[0] - 1))
    numbers, keys = line.numbers[beats[starts]], keys[starts]
    scores = np.add.reduceat(evidence, starts, axis=0)
    if heard.is_long:
        melody = heard.sung_between(np.append(line.beats[beats[starts]], line.beats[beats[-1] + 1]))
        asked, *_ = default_melody_reader().judge(melody, keys, line.beats_per_bar, numbers)
        scores = scores + _MELODY_EVIDENCE * asked
    costs = (
        _CHANGE_COSTS[line.beats_per_bar][:, None, None, None] - _CHANGE_WEIGHT * load_progressions().changes
    )
    path = find_path(scores, [costs[at] for at in zip(numbers, keys, strict=True)])
    return np.repeat(path, np.diff(np.append(starts, len(evidence))))


class _Bars:
    """The bars of a song, which of them are sung, and which alike."""

    def __init__(self, heard: Heard, line: TimeLine) -> None:
        self._heard = heard
        frames = len(heard.place)
        beats = line.beats_of(frames)
        # A bar's beats stand in its slots; one of more beats than usual fills its own again.
        begins = np.cumsum(line.numbers == 0)
        self.of_frame = begins[beats.clip(0)] - begins[beats.clip(0)[0]]
        self.beats = line.beats_per_bar
        self.slots = self.of_frame * self.beats + line.numbers[beats.clip(0)]
        self.count = int(self.of_frame[-1]) + 1
        sung = heard.pitch_classes
        size = np.maximum(np.bincount(self.of_frame, minlength=self.count), 1)
        self.sung = np.bincount(self.of_frame, weights=sung.sum(axis=1), minlength=self.count) / size
        melody = self._sum_slots(sung).reshape(self.count, -1)
        self.alike = _compare(melody)  # [bars, bars], 0 to 1

    def _sum_slots(self, values: np.ndarray) -> np.ndarray:
        """Sums [bars, slots, ...] of values [frames, ...]."""
        sums = np.zeros((self.count * self.beats, values.shape[1]))
        np.add.at(sums, self.slots, values)
        return sums.reshape(self.count, self.beats, values.shape[1])

    def share_evidence(self) -> np.ndarray:
        """Evidence of chords [frames, NO_CHORD] in nats, of each bar and of those that are sung like it."""
        heard = self._heard
        told = heard.chord[:, :NO_CHORD]
        length = self._sum_slots(np.ones((len(told), 1)))
        bars = (self._sum_slots(told) / np.maximum(length, 1)).reshape(self.count, -1)
        sung = self.sung > _SUNG
        weights = _ALIKE_SHARPNESS * (self.alike - _ALIKE)
        weights = 1 / (1 + np.exp(-weights)) * sung[None, :] * sung[:, None]
        np.fill_diagonal(weights, 1.0)
        shared = weights @ bars / weights.sum(axis=1, keepdims=True)
        for bar in np.flatnonzero(self.sung < _HARDLY_SUNG):
            for phrase in (_PHRASE_BARS, _PART_BARS, 1):
                models = np.flatnonzero(sung & ((np.arange(self.count) - bar) % phrase == 0))
                if len(models):
                    shared[bar] = shared[models[np.abs(models - bar).argmin()]]
                    break
        return _CHORD_EVIDENCE * shared.reshape(-1, NO_CHORD)[self.slots]

    def find_again(self, line: TimeLine) -> np.ndarray:
        """The earlier frame [frames] that each frame plays again, -1 where nothing long enough was sung so.

        A passage goes on at one distance in frames as long as that is right by a frame.
        """
        again = np.full(len(self.of_frame), -1)
        starts = np.searchsorted(self.of_frame, np.arange(self.count + 1))
        first_line = np.searchsorted(line.bar_lines, starts[1] - 0.5) - 1 if self.count > 1 else 0
        times = line.bar_lines[max(first_line, 0) :]  # of bar 0, if it begins in the song or before it
        known = (self.alike > _AGAIN) & (self.sung > _SUNG)[:, None] & (self.sung > _SUNG)[None, :]
        bar = 0
        while bar < self.count:
            runs = {}
            for lag in range(_PHRASE_BARS, bar + 1):
                ends = np.flatnonzero(~known[np.arange(bar, self.count), np.arange(bar, self.count) - lag])
                length = min(int(ends[0]) if len(ends) else self.count - bar, lag)
                if length >= _PHRASE_BARS:
                    runs[lag] = length
            if not runs:
                bar += 1
                continue
            lag = max(runs, key=lambda each: runs[each])
            distance = 0
            for each in range(bar, bar + runs[lag]):
                if each < len(times):
                    exact = times[each] - times[each - lag]
                    distance = distance if abs(distance - exact) <= 1 else round(exact)
                again[starts[each] : starts[each + 1]] = np.arange(starts[each], starts[each + 1]) - distance
            bar += runs[lag]
        return again

    def name_sections(self) -> list[Section]:
        """The song's sections; what is sung alike has one letter."""
        runs = _join_runs(self.sung > _SUNG)
        pieces: list[tuple[int, int, str]] = []  # first bar, bar behind the last, letter
        letters: list[list[int]] = []  # first bars of the blocks of each letter
        for first, last, is_sung in runs:
            if not is_sung:
                pieces.append((first, last, ""))
                continue
            for block in range(first, last, _PART_BARS):
                end = min(block + _PART_BARS, last)
                if last - end < _PART_BARS // 2:
                    end = last
                letter = next(
                    (number for number, known in enumerate(letters) if self._is_like(block, end, known)), None
                )
                if letter is None:
                    letter = len(letters)
                    letters.append([])
                letters[letter].append(block)
                name = chr(ord("A") + min(letter, 25))
                if pieces and pieces[-1][2] == name and pieces[-1][1] == block:
                    pieces[-1] = (pieces[-1][0], end, name)
                else:
                    pieces.append((block, end, name))
                if end == last:
                    break
        return self._describe(pieces)

    def _is_like(self, first: int, last: int, known: Sequence[int]) -> bool:
        """Whether the bars first..last are sung like any block of `known`."""
        for other in known:
            length = min(last - first, self.count - other)
            if length and np.mean([self.alike[first + i, other + i] for i in range(length)]) > _ALIKE:
                return True
        return False

    def _describe(self, pieces: list[tuple[int, int, str]]) -> list[Section]:
        pitches = self._heard.pitches
        per_frame = max(1, round(len(pitches) / len(self.of_frame)))
        heights: dict[str, list[float]] = {}
        edges = np.searchsorted(self.of_frame, np.arange(self.count + 1))
        for first, last, letter in pieces:
            if letter:
                sung = pitches[edges[first] * per_frame : edges[last] * per_frame]
                sung = sung[np.isfinite(sung)]
                heights.setdefault(letter, []).append(float(np.median(sung)) if len(sung) else 0.0)
        again = {letter: np.mean(values) for letter, values in heights.items() if len(values) > 1}
        chorus = max(again, key=lambda letter: again[letter]) if again else None
        sections = []
        for number, (first, last, letter) in enumerate(pieces):
            if not letter:
                name = "intro" if number == 0 else "ending" if number == len(pieces) - 1 else "interlude"
            elif letter == chorus:
                name = "chorus"
            elif letter not in again and chorus is not None and first > self.count // 2:
                name = "bridge"
            else:
                name = "verse"
            sections.append(Section(start=int(edges[first]), end=int(edges[last]), name=name, letter=letter))
        return sections


def _compare(melody: np.ndarray) -> np.ndarray:
    """Cosines [bars, bars] of the passages around two bars, of melody [bars, features]."""
    count = len(melody)
    norms = np.linalg.norm(melody, axis=1)
    products, sizes = melody @ melody.T, np.outer(norms, norms)
    total, size = np.zeros((count, count)), np.full((count, count), 1e-9)
    for shift in range(-min(_REACH_BARS, count - 1), min(_REACH_BARS, count - 1) + 1):
        here = slice(max(0, -shift), count - max(0, shift))
        there = slice(max(0, shift), count - max(0, -shift))
        total[here, here] += products[there, there]
        size[here, here] += sizes[there, there]
    return total / size


def _join_runs(sung: np.ndarray) -> list[tuple[int, int, bool]]:
    """Runs (first, behind the last, sung) of bars [bars]; short pauses between sung bars are sung."""
    edges = [0, *(np.flatnonzero(np.diff(sung)) + 1).tolist(), len(sung)]
    runs: list[tuple[int, int, bool]] = []
    for first, last in pairwise(edges):
        short = 0 < first and last < len(sung) and last - first < _LONG_PAUSE_BARS
        is_sung = bool(sung[first]) or short
        if runs and runs[-1][2] == is_sung:
            runs[-1] = (runs[-1][0], last, is_sung)
        else:
            runs.append((first, last, is_sung))
    return runs
