"""The lead sheet of a song as people know it: a tempo and a chord chart in, bars, beats and chords out."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.lm.contract import LanguageModel
from duotok.lm.sheet.columns import BEATS_PER_BAR, CHORD, CHORD_TRUST, PLACE_TRUST, UNKNOWN, WRITTEN
from duotok.lm.sheet.plan import Heard, SongPlan, plan_song
from duotok.lm.sheet.timeline import find_meter, places_in
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_small_text, shown_name
from duotok.tokenizer.music.chroma import CHROMA_RATE_HZ, average_blocks, measure_chroma
from duotok.tokenizer.music.harmony import Key, default_reader
from duotok.tokenizer.music.labels import (
    NO_CHORD,
    UNKNOWN_CHORD,
    name_chord,
    name_key,
    nearest_triad,
    parse_chord,
    parse_key,
)
from duotok.tokenizer.music.tempo import ENVELOPE_RATE_HZ, onset_envelope

Chart = list[tuple[float, float, str]]  # start seconds, end seconds, label
TEMPO_RANGE_BPM = (55.0, 210.0)
_LONGEST_CHART_BYTES = 1_000_000
_EXAMPLE = "give lines such as '0.0 2.4 C:maj'"
_OVERLAP_SECONDS = 0.005  # times are rounded
_MOST_EXAMPLES = 5
# How much bands play in each sixteenth of a bar over what they do in any (validation songs of PopBand).
_ONSETS = np.array([2.0, 0.5, 0.7, 1.0, 1.25, 0.6, 0.95, 1.0, 1.6, 0.55, 0.85, 1.05, 1.2, 0.7, 0.9, 1.0])
_ONSET_EVIDENCE = 20.0  # two seconds of a band say more of its beat than of a voice
_FADE_OUT_SECONDS, _FADE_IN_SECONDS = 0.1, 0.02  # the band rings out; what follows a rest begins in full


@dataclass(frozen=True, kw_only=True)
class SheetWishes:
    """What somebody knows of the song beforehand; the rest is read out of the vocal."""

    tempo_bpm: float | None = None
    downbeat_seconds: float | None = None  # where a bar begins
    key: str | None = None  # of the whole song
    chart: Chart | None = None  # is put into order
    beats_per_bar: int | None = None  # None: as it is sung, if the band plays it

    def __post_init__(self) -> None:
        low, high = TEMPO_RANGE_BPM
        if self.tempo_bpm is not None and not low <= self.tempo_bpm <= high:
            raise ConfigError(
                f"the tempo must be from {low:g} to {high:g} beats per minute, got {self.tempo_bpm:g}"
            )
        if self.downbeat_seconds is not None and not 0 <= self.downbeat_seconds < float("inf"):
            raise ConfigError(f"the downbeat must be at 0 s or later, got {self.downbeat_seconds:g}")
        if self.key is not None:
            parse_key(self.key)
        if self.chart is not None:
            places = [f"chord {number} of the chart" for number in range(1, len(self.chart) + 1)]
            object.__setattr__(self, "chart", _check_chart(self.chart, places))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line that says which chords are played as others, and one if they contradict the key."""
        return (*self._warn_of_others(), *self._warn_of_key())

    def _warn_of_key(self) -> tuple[str, ...]:
        if self.key is None or self.chart is None:
            return ()
        key, inside, total = parse_key(self.key), 0.0, 0.0
        scale = Key(tonic=key % 12, mode=("maj", "min")[key // 12]).scale
        for start, end, label in self.chart:
            number, _ = nearest_triad(label)
            if number not in (NO_CHORD, UNKNOWN_CHORD):
                total += end - start
                inside += (end - start) * ({number % 12, (number + 7) % 12} <= scale)
        if inside >= 0.5 * total:
            return ()
        return (
            f"most of the chords are not in {name_key(key)}; the chords are played, the key where they end",
        )

    def _warn_of_others(self) -> tuple[str, ...]:
        played: dict[str, str] = {}
        for _, _, label in self.chart or ():
            number, share = nearest_triad(label)
            if number not in (NO_CHORD, UNKNOWN_CHORD):
                chord = parse_chord(label)
                if share < 1 or chord is None or chord.root != number % 12:
                    played[label] = name_chord(number)
        if not played:
            return ()
        shown = ", ".join(f"{label} as {name}" for label, name in list(played.items())[:_MOST_EXAMPLES])
        more = f" and {len(played) - _MOST_EXAMPLES} more" if len(played) > _MOST_EXAMPLES else ""
        return (f"the band knows major and minor chords only and plays the nearest: {shown}{more}",)


def read_chart(path: str | Path) -> Chart:
    """Read the chord chart in a file; see parse_chart."""
    text = read_small_text(path, _LONGEST_CHART_BYTES, wanted="lines such as '0.0 2.4 C:maj' in a text file")
    return parse_chart(text, shown_name(path))


def parse_chart(text: str, name: str) -> Chart:
    """Read a chord chart: a line "start end chord" per chord, in seconds; returns the chords in order.

    name: what messages call it.
    Chords are in Harte's syntax ("C:min7/b3", "N" for none, "X" for any) or a lead sheet's ("Cm7", "N.C.").
    Empty lines and what follows a "#" that begins a word are skipped. Raises DataError, which names the line.
    """
    chart: Chart = []
    places: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if not words:
            continue
        place = f"{name}, line {number}"
        try:
            start, end, label = words
            chart.append((float(start), float(end), label))
        except ValueError as error:
            raise DataError(f"{place}: {line.strip()[:60]!r} is not 'start end chord'") from error
        places.append(place)
    if not chart:
        raise DataError(f"{name} has no chords; {_EXAMPLE}")
    return _check_chart(chart, places)


def _check_chart(chart: Sequence[tuple[float, float, str]], places: Sequence[str]) -> Chart:
    """The chart in order of time; DataError names the place of a chord that cannot be."""
    for (start, end, label), place in zip(chart, places, strict=True):
        if not 0 <= start < end < float("inf"):
            raise DataError(f"{place}: a chord must begin at 0 or later and end after that")
        try:
            nearest_triad(label)
        except DataError as error:
            raise DataError(f"{place}: {error}") from error
    entries = sorted(zip(chart, places, strict=True), key=lambda entry: entry[0][:2])
    for (before, earlier), (after, later) in pairwise(entries):
        if after[0] < before[1] - _OVERLAP_SECONDS:
            raise DataError(f"{later}: begins at {after[0]:g} s, before {earlier} ends at {before[1]:g} s")
    return [entry for entry, _ in entries]


def make_plan(
    lm: LanguageModel[Any],
    vocal_codes: Tensor,
    pitches: np.ndarray,
    rate_hz: float,
    wishes: SheetWishes,
    prefix: Tensor | None = None,
) -> SongPlan | None:
    """Plan the song of vocal codes [frames] and sung MIDI pitches [k * frames]; what is wished is kept.

    prefix: what the band has played already [2, samples]; the plan goes on from its beats, chords and key.
    A chord that the model does not know is the nearest it does, trusted by the share of its notes. None where
    the model plays from no sheet; ConfigError if something was wished of it.
    """
    told = lm.hear_sheet(vocal_codes[None])
    if told is None:
        if wishes != SheetWishes():
            raise ConfigError(
                "this model plays from no lead sheet; leave out --tempo, --key, --downbeat, --chords"
            )
        return None
    place, chord = (told[name][0].double().numpy() for name in ("place", "chord"))
    find = partial(
        find_meter, place, rate_hz, tempo_bpm=wishes.tempo_bpm, downbeat_seconds=wishes.downbeat_seconds
    )
    sung = beats_per_bar = wishes.beats_per_bar or find()
    played = lm.band.meters() if lm.band else (BEATS_PER_BAR,)
    if wishes.beats_per_bar is None and sung not in played:
        beats_per_bar = find(among=played)
    place = places_in(place, beats_per_bar)
    given = 0 if prefix is None else _hear_start(prefix, place, chord, rate_hz)
    plan = plan_song(
        Heard(place=place, chord=chord, pitches=pitches, rate_hz=rate_hz, given_frames=given),
        tempo_bpm=wishes.tempo_bpm,
        downbeat_seconds=wishes.downbeat_seconds,
        key=None if wishes.key is None else parse_key(wishes.key),
        beats_per_bar=beats_per_bar,
    )
    if sung != beats_per_bar:
        plan = replace(plan, sung_beats_per_bar=sung)
    sheet = plan.sheet
    write_chords(sheet, wishes.chart or (), rate_hz, 0, len(sheet))
    differs = sheet[plan.again.clamp_min(0), CHORD] != sheet[:, CHORD]
    return replace(plan, again=plan.again.masked_fill(differs, -1)) if wishes.chart else plan


def write_chords(
    sheet: Tensor, chart: Sequence[tuple[float, float, str]], rate_hz: float, begin: int, stop: int
) -> None:
    """Write the chords of a chart into frames begin..stop of a sheet [frames, COLUMNS], in place."""
    for start, end, label in chart:
        # A frame has the chord that sounds in its middle.
        places = (int(np.ceil(min(time * rate_hz, len(sheet)) - 0.5)) for time in (start, end))
        first, last = (min(max(place, begin), stop) for place in places)
        number, share = nearest_triad(label)
        if number != UNKNOWN_CHORD:
            sheet[first:last, CHORD], sheet[first:last, CHORD_TRUST] = number, round(share * WRITTEN)


def _hear_start(start: Tensor, place: np.ndarray, chord: np.ndarray, rate_hz: float) -> int:
    """Add what a given start says to log-probabilities [frames, ...] of places and chords; its frames."""
    onsets = onset_envelope(start)
    ends = (np.arange(len(place) + 1) * ENVELOPE_RATE_HZ / rate_hz).astype(int)
    frames = int(np.searchsorted(ends, len(onsets), side="right")) - 1
    if frames < 1 or onsets.max() <= 0:
        return 0
    onsets = np.add.reduceat(onsets[: ends[frames]], ends[:frames])
    told = place[:frames] + _ONSET_EVIDENCE * (onsets / onsets.mean())[:, None] * np.log(_ONSETS)
    place[:frames] = told - np.logaddexp.reduce(told, axis=1, keepdims=True)
    blocks = average_blocks(measure_chroma(start), CHROMA_RATE_HZ)
    if len(blocks):
        heard = default_reader().judge(torch.from_numpy(blocks).float()).double().numpy()
        of_frames = (np.arange(frames) * len(blocks) / frames).astype(int)
        chord[:frames] = heard[of_frames]
    return frames


def find_rests(sheet: Tensor) -> np.ndarray:
    """Where somebody wrote that there is no chord [frames] bool; what was read is never as sure."""
    return ((sheet[:, CHORD] == NO_CHORD) & (sheet[:, CHORD_TRUST] == WRITTEN)).numpy()


def keep_rests(wave: Tensor, sheet: Tensor | None, rate_hz: float) -> Tensor:
    """Return the band's wave [channels, samples] silent where "N" was written, faded at both ends."""
    if sheet is None or not find_rests(sheet).any():
        return wave
    wave, samples = wave.clone(), wave.shape[-1]
    edges = np.flatnonzero(np.diff(find_rests(sheet), prepend=False, append=False))
    for first, last in edges.reshape(-1, 2).tolist():
        begin, end = (min(samples, round(frame / rate_hz * SAMPLE_RATE_HZ)) for frame in (first, last))
        end = samples if last == len(sheet) else end
        half = (end - begin) // 2
        fade_out = 0 if begin == 0 else min(half, round(_FADE_OUT_SECONDS * SAMPLE_RATE_HZ))
        fade_in = 0 if end == samples else min(half, round(_FADE_IN_SECONDS * SAMPLE_RATE_HZ))
        wave[:, begin : begin + fade_out] *= torch.linspace(1, 0, fade_out)
        wave[:, begin + fade_out : end - fade_in] = 0
        wave[:, end - fade_in : end] *= torch.linspace(0, 1, fade_in)
    return wave


def find_beats(plan: SongPlan | None) -> np.ndarray:
    """The beats of a plan that fall into the song [beats], in seconds."""
    if plan is None:
        return np.zeros(0)
    beats = plan.time_line.beats
    return beats[(beats >= 0) & (beats < len(plan.sheet))] / plan.time_line.rate_hz


def describe_plan(plan: SongPlan | None, fifths: int = 0) -> dict[str, Any] | None:
    """Return the part of report.json that says what the band was shown, chords spelled as in a key.

    Times are in seconds; bar lines are real numbers, not those of the frames they fall into.
    """
    if plan is None:
        return None
    sheet, line = plan.sheet, plan.time_line
    frames, rate_hz = len(sheet), line.rate_hz

    def seconds(frame: float) -> float:
        return round(float(frame) / rate_hz, 4)

    other = plan.other_tempo
    return {
        "trust": {"bars": _mean_trust(sheet[:, PLACE_TRUST]), "chords": _mean_trust(sheet[:, CHORD_TRUST])},
        "tempo_bpm": round(line.tempo_bpm, 3),
        "half_or_double": other and {"tempo_bpm": round(other[0], 3), "share": round(other[1], 3)},
        "bar_lines_seconds": [seconds(at) for at in line.bar_lines if 0 <= at <= frames],
        "keys": [[seconds(first), seconds(last), name_key(key)] for first, last, key in plan.keys]
        if plan.has_singer
        else None,
        "chords": name_chords(sheet, rate_hz, fifths),
        "sections": [[seconds(s.start), seconds(s.end), s.name, s.letter] for s in plan.sections],
    }


def name_chords(sheet: Tensor, rate_hz: float, fifths: int) -> list[list[Any]]:
    """Rows of start and end in seconds and chord of a sheet [frames, COLUMNS], spelled in a key."""
    chords = sheet[:, CHORD].numpy()
    edges = [0, *(np.flatnonzero(np.diff(chords)) + 1).tolist(), len(chords)]
    return [
        [round(first / rate_hz, 4), round(last / rate_hz, 4), name_chord(int(chords[first]), fifths)]
        for first, last in pairwise(edges)
    ]


def _mean_trust(levels: Tensor) -> float | None:
    """How sure the reader was on the whole: 0 guessed, 1 written."""
    known = levels[levels != UNKNOWN].float()
    return round(float(known.mean()) / WRITTEN, 3) if len(known) else None
