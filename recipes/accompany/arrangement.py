"""What the band is told beside the lead sheet: its style, and when drums, bass and chords play how much.

Nobody says that for a whole song, so it is drawn, as a musician would play: a style that is usual at such a
tempo, less in a verse than in a chorus, one stroke that rings in the last bar. A song is cut into parts, the
same for all candidates; a seed draws what each part plays, so that passages of a part are played alike.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.lm.sheet.columns import CHORD, METER, METERS, STYLE, TEMPO, UNKNOWN
from duotok.lm.sheet.plan import SongPlan
from duotok.lm.sheet.playing import (
    FULL,
    HELD,
    LEVELS,
    LIGHT,
    OUT,
    STEM_COLUMNS,
    BandConfig,
    tempo_class,
)
from duotok.recipes.accompany.request import METER_NAMES, Request
from duotok.recipes.accompany.wishes import TEMPO_RANGE_BPM, SheetWishes
from duotok.tokenizer.common.errors import ConfigError

_LEAST_SECONDS = 60.0  # a shorter recording without an ending is an excerpt, and stops anywhere
_EARLY_SHARE = 1 / 8  # of a bar: who begins so little before a bar line begins there
_PLAIN = ((LIGHT, LIGHT, LIGHT), (FULL, FULL, FULL))
_BEGINNING, _LAST_BAR, _BEHIND = "beginning", "last bar", "behind the last bar"
# Part of a song -> what drums, bass and chords may do in it, each as likely.
_MANNERS = {
    _BEGINNING: ((OUT, LIGHT, LIGHT), (HELD, LIGHT, LIGHT)),
    "intro": _PLAIN[:1],
    "verse": _PLAIN,
    "chorus": _PLAIN[1:],
    "bridge": ((LIGHT, LIGHT, LIGHT), (OUT, LIGHT, LIGHT)),
    "interlude": _PLAIN,
    "ending": _PLAIN,
    _LAST_BAR: ((HELD, HELD, HELD),),
    _BEHIND: ((OUT, HELD, HELD),),
}


def settle_band(request: Request, band: BandConfig | None) -> Request:
    """Return a request that a model's band can play, or ConfigError; a style that is asked for has its meter.

    band: None of a model that knows no styles.
    """
    if band is None:
        asked = {"--style": request.style, "--without": request.without, "--meter": request.meter}
        options = ", ".join(option for option, value in asked.items() if value)
        if options:
            raise ConfigError(f"this model knows no styles; leave out {options}")
        return request
    if request.style is not None and request.style not in band.styles:
        raise ConfigError(f"style must be one of {', '.join(band.styles)}, got {request.style!r}")
    if request.meter is not None and request.beats_per_bar not in band.meters():
        known = ", ".join(METER_NAMES[beats] for beats in band.meters())
        raise ConfigError(f"this model has heard no band in {request.meter}; it plays in {known}")
    if request.style is None or request.meter is not None or request.repaint is not None:
        return request
    _, beats = max((count, beats) for style, beats, _, count in band.heard if style == request.style)
    return replace(request, meter=METER_NAMES[beats])


@dataclass(frozen=True, kw_only=True)
class Arrangement:
    """How the song of a plan may be played; as the plan says, and no more, by a model that knows no band."""

    plan: SongPlan
    band: BandConfig | None
    request: Request

    @cached_property
    def parts(self) -> Sequence[str]:
        """Part of the song [frames] that each frame is in; empty where nothing is known of it."""
        return _find_parts(self.plan) if self.band is not None else [""] * len(self.plan.sheet)

    @cached_property
    def _frames_of(self) -> Mapping[str, Tensor]:
        """Part of the song -> which frames are in it [frames] bool."""
        names = filter(None, dict.fromkeys(self.parts))
        return {name: torch.tensor([part == name for part in self.parts]) for name in names}

    @property
    def ending_seconds(self) -> float:
        """How long the last bar rings, until the end; 0 where the song just stops."""
        return sum(part in (_LAST_BAR, _BEHIND) for part in self.parts) / self.plan.time_line.rate_hz

    @property
    def again(self) -> Tensor:
        """The plan's `again`, where it is of the same part."""
        numbers = {part: number for number, part in enumerate(dict.fromkeys(self.parts))}
        parts = torch.tensor([numbers[part] for part in self.parts])
        return self.plan.again.masked_fill(parts[self.plan.again.clamp_min(0)] != parts, -1)

    def draw_styles(self, number: int) -> Sequence[str | None]:
        """Return the style of each candidate: what is asked for, else what the request's seed draws."""
        if self.band is None or self.request.style is not None:
            return [self.request.style] * number
        line, rng = self.plan.time_line, np.random.default_rng(self.request.seed or 0)
        return self.band.draw(number, beats=line.beats_per_bar, beats_per_minute=line.tempo_bpm, rng=rng)

    def tell(self, style: str | None, seed: int) -> Tensor:
        """Return the sheet [frames, COLUMNS] of a candidate in a style that was drawn."""
        if self.band is None or style is None:
            return self.plan.sheet
        sheet, line, rng = self.plan.sheet.clone(), self.plan.time_line, np.random.default_rng(seed)
        sheet[:, METER] = METERS.index(line.beats_per_bar)
        sheet[:, TEMPO] = tempo_class(line.tempo_bpm)
        sheet[:, STYLE] = self.band.styles.index(style)
        columns = list(STEM_COLUMNS.values())
        for part, inside in self._frames_of.items():
            manners = _MANNERS[part.partition(":")[0]]
            for column, level in zip(columns, manners[rng.integers(len(manners))], strict=True):
                sheet[inside, column] = level
        for stem in self.request.without:
            sheet[:, STEM_COLUMNS[stem]] = OUT
        ringing = len(sheet) - round(self.ending_seconds * line.rate_hz)
        if ringing < len(sheet) and self.request.chords is None:
            sheet[ringing:, CHORD] = sheet[ringing, CHORD]
        return sheet


def _find_parts(plan: SongPlan) -> list[str]:
    """The part of the song [frames] that each frame is in, empty where the plan has no sections."""
    frames, line = len(plan.sheet), plan.time_line
    lines = np.round(line.bar_lines[(line.bar_lines >= 0) & (line.bar_lines <= frames + 0.5)]).astype(int)
    parts = [""] * frames
    for section in plan.sections if len(plan.sections) > 1 else ():
        parts[section.start : section.end] = [f"{section.name}:{section.letter}"] * (
            section.end - section.start
        )
        if section.name == "intro" and len(lines):
            half = int(lines[np.abs(lines - (section.start + section.end) / 2).argmin()])
            parts[section.start : half] = [_BEGINNING] * (half - section.start)
    last, end = lines[-2:] if len(lines) > 1 else (frames, frames)
    final = plan.sections[-1]
    if frames >= _LEAST_SECONDS * line.rate_hz or (final.name == "ending" and final.start <= last):
        parts[last:] = [_LAST_BAR] * (end - last) + [_BEHIND] * (frames - end)
    return parts[:frames]


def describe_band(
    request: Request, plan: SongPlan | None, style: str | None, sheet: Tensor | None
) -> dict[str, Any]:
    """Return the part of report.json that says what the band was told, in a style by a sheet.

    Times of levels are in seconds; stems whose level was left to the model are not named.
    """
    return {
        "style": style,
        "drawn": style is not None and request.style is None,
        "meter": None if plan is None else METER_NAMES[plan.time_line.beats_per_bar],
        "without": list(request.without),
        "levels": [] if plan is None or sheet is None else describe_levels(sheet, plan.time_line.rate_hz),
    }


def describe_levels(sheet: Tensor, rate_hz: float) -> list[list[Any]]:
    """Rows of start and end in seconds and how much each stem plays, of a sheet [frames, COLUMNS]."""
    told = sheet[:, list(STEM_COLUMNS.values())]
    changes = (told[1:] != told[:-1]).any(dim=1).nonzero()[:, 0] + 1
    rows = []
    for first, last in pairwise([0, *changes.tolist(), len(sheet)]):
        levels = {
            stem: LEVELS[level]
            for stem, level in zip(STEM_COLUMNS, told[first].tolist(), strict=True)
            if level != UNKNOWN
        }
        if levels:
            rows.append([round(first / rate_hz, 3), round(last / rate_hz, 3), levels])
    return rows


def begin_band(
    plan: SongPlan, pitches: np.ndarray, bars: int, wishes: SheetWishes
) -> tuple[float, SheetWishes]:
    """Return when a band begins, so many bars before the singer's first bar, and what is then wished.

    pitches: sung MIDI pitch over the whole song, NaN where nothing is sung. A time in seconds; negative: the
    song becomes longer by this at its beginning, and all in it comes later, in the tempo that was found;
    positive: the band rests until then.
    """
    line, sung = plan.time_line, np.flatnonzero(np.isfinite(pitches))
    begins = sung[0] / len(pitches) * len(plan.sheet) if len(sung) else 0.0
    lines = line.bar_lines
    number = min(max(int(np.searchsorted(lines, begins, side="right")) - 1, 0), len(lines) - 2)
    bar = lines[number + 1] - lines[number]
    first = lines[number] + (begins > lines[number + 1] - _EARLY_SHARE * bar) * bar
    seconds = float(first - bars * bar) / line.rate_hz
    later = max(0.0, -seconds)
    chart = [(0.0, seconds, "N")] if seconds > 0 else []
    for start, end, label in wishes.chart or ():
        if end + later > seconds:
            chart.append((max(start + later, seconds), end + later, label))
    tempo_bpm, downbeat = wishes.tempo_bpm, wishes.downbeat_seconds
    if downbeat is not None:
        downbeat += later
    elif later and TEMPO_RANGE_BPM[0] <= line.tempo_bpm <= TEMPO_RANGE_BPM[1]:
        downbeat = float(first) / line.rate_hz + later
        is_steady = float(np.ptp(np.diff(line.beats))) < 1e-6
        tempo_bpm = line.tempo_bpm if tempo_bpm is None and is_steady else tempo_bpm
    return seconds, replace(wishes, tempo_bpm=tempo_bpm, downbeat_seconds=downbeat, chart=chart or None)
