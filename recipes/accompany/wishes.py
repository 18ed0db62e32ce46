"""The lead sheet of a song as people know it: a tempo and a chord chart in, bars, beats and chords out."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.lm.contract import LanguageModel
from duotok.lm.sheet.columns import CHORD, CHORD_TRUST, PLACE, PLACE_TRUST, UNKNOWN, WRITTEN
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.common.files import read_small_text, shown_name
from duotok.tokenizer.music.labels import NO_CHORD, UNKNOWN_CHORD, name_chord, nearest_triad, parse_chord

Chart = list[tuple[float, float, str]]  # start seconds, end seconds, label
TEMPO_RANGE_BPM = (55.0, 210.0)
_BEATS_PER_BAR = 4
_TEMPO_TOLERANCE = 0.03  # singers who follow a click still breathe
_LONGEST_CHART_BYTES = 1_000_000
_EXAMPLE = "give lines such as '0.0 2.4 C:maj'"
_OVERLAP_SECONDS = 0.005  # times are rounded
_MOST_EXAMPLES = 5
_FADE_OUT_SECONDS, _FADE_IN_SECONDS = 0.1, 0.02  # the band rings out; what follows a rest begins in full


@dataclass(frozen=True, kw_only=True)
class SheetWishes:
    """What somebody knows of the song beforehand; the rest is read out of the vocal."""

    tempo_bpm: float | None = None  # of four beats in a bar
    chart: Chart | None = None  # is put into order

    def __post_init__(self) -> None:
        low, high = TEMPO_RANGE_BPM
        if self.tempo_bpm is not None and not low <= self.tempo_bpm <= high:
            raise ConfigError(
                f"the tempo must be from {low:g} to {high:g} beats per minute, got {self.tempo_bpm:g}"
            )
        if self.chart is not None:
            places = [f"chord {number} of the chart" for number in range(1, len(self.chart) + 1)]
            object.__setattr__(self, "chart", _check_chart(self.chart, places))

    @property
    def warnings(self) -> tuple[str, ...]:
        """One line that says which chords are played as others, if there are any."""
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
    """Read a chord chart: a line "start end chord" per chord, in seconds; returns the chords in order.

    Chords are in Harte's syntax ("C:min7/b3", "N" for none, "X" for any) or a lead sheet's ("Cm7", "N.C.").
    Empty lines and what follows a "#" that begins a word are skipped. Raises DataError, which names the line.
    """
    text = read_small_text(path, _LONGEST_CHART_BYTES, wanted="lines such as '0.0 2.4 C:maj' in a text file")
    path = shown_name(path)
    chart: Chart = []
    places: list[str] = []
    for number, line in enumerate(text.splitlines(), start=1):
        words = list(takewhile(lambda word: not word.startswith("#"), line.split()))
        if not words:
            continue
        place = f"{path}, line {number}"
        try:
            start, end, label = words
            chart.append((float(start), float(end), label))
        except ValueError as error:
            raise DataError(f"{place}: {line.strip()[:60]!r} is not 'start end chord'") from error
        places.append(place)
    if not chart:
        raise DataError(f"{path} has no chords; {_EXAMPLE}")
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


def make_sheet(
    lm: LanguageModel[Any], vocal_codes: Tensor, rate_hz: float, wishes: SheetWishes
) -> Tensor | None:
    """Return the sheet [frames, COLUMNS] of vocal codes [frames]: read, with what is wished in its place.

    A chord that the model does not know is the nearest it does, trusted by the share of its notes. None where
    the model knows no sheets; ConfigError if something was wished of it.
    """
    bar_seconds = None
    if wishes.tempo_bpm is not None:
        bar = 60 * _BEATS_PER_BAR / wishes.tempo_bpm
        bar_seconds = (bar * (1 - _TEMPO_TOLERANCE), bar * (1 + _TEMPO_TOLERANCE))
    sheet = lm.read_sheet(vocal_codes[None].to(next(lm.parameters()).device), bar_seconds=bar_seconds)
    if sheet is None:
        if wishes != SheetWishes():
            raise ConfigError("this model plays from no lead sheet; leave out --tempo and --chords")
        return None
    sheet = sheet[0].cpu()
    for start, end, label in wishes.chart or ():
        # A frame has the chord that sounds in its middle.
        first, last = (int(np.ceil(min(time * rate_hz, len(sheet)) - 0.5)) for time in (start, end))
        number, share = nearest_triad(label)
        if number != UNKNOWN_CHORD:
            sheet[first:last, CHORD], sheet[first:last, CHORD_TRUST] = number, round(share * WRITTEN)
    return sheet


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


def find_beats(sheet: Tensor | None) -> np.ndarray:
    """Beats [beats] in frames, four in a bar, the bar lines among them; none without two bar lines.

    Bars that the song's ends cut go on as their neighbours do.
    """
    lines = np.zeros(0) if sheet is None else _find_bar_lines(sheet)
    if sheet is None or len(lines) < 2:
        return np.zeros(0)
    steps = np.diff(lines) / _BEATS_PER_BAR
    before = np.arange(1, lines[0] // steps[0] + 1)[::-1]
    inside = lines[:-1, None] + steps[:, None] * np.arange(_BEATS_PER_BAR)
    after = np.arange(lines[-1], len(sheet), steps[-1])
    return np.concatenate([lines[0] - before * steps[0], inside.ravel(), after])


def describe_sheet(sheet: Tensor | None, rate_hz: float, fifths: int = 0) -> dict[str, Any] | None:
    """Return the part of report.json that says what the band was shown, chords spelled as in a key."""
    if sheet is None:
        return None
    chords, lines = sheet[:, CHORD].numpy(), _find_bar_lines(sheet)
    bars = np.diff(lines) / rate_hz
    edges = [0, *(np.flatnonzero(np.diff(chords)) + 1).tolist(), len(chords)]
    return {
        "trust": {"bars": _mean_trust(sheet[:, PLACE_TRUST]), "chords": _mean_trust(sheet[:, CHORD_TRUST])},
        "tempo_bpm": round(float(60 * _BEATS_PER_BAR / np.median(bars)), 2) if len(bars) else None,
        "bar_lines_seconds": [round(line / rate_hz, 3) for line in lines.tolist()],
        "chords": [
            [round(begin / rate_hz, 3), round(end / rate_hz, 3), name_chord(int(chords[begin]), fifths)]
            for begin, end in pairwise(edges)
            if begin < end
        ],
    }


def _find_bar_lines(sheet: Tensor) -> np.ndarray:
    """Bar lines [lines] in frames."""
    places = sheet[:, PLACE].numpy()
    known = (places[1:] != UNKNOWN) & (places[:-1] != UNKNOWN)
    return np.flatnonzero(known & (places[1:] < places[:-1])) + 1


def _mean_trust(levels: Tensor) -> float | None:
    """How sure the reader was on the whole: 0 guessed, 1 written."""
    known = levels[levels != UNKNOWN].float()
    return round(float(known.mean()) / WRITTEN, 3) if len(known) else None
