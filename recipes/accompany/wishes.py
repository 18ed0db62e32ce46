"""The lead sheet of a song as people know it: a tempo and a chord chart in, bars and chords out."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.sheet.columns import CHORD, CHORD_TRUST, PLACE, PLACE_TRUST, UNKNOWN, WRITTEN, write_sheet
from duotok.recipes.corpus.chord_classes import chords_of_blocks
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.music.chord_names import CHORD_NAMES

Chart = list[tuple[float, float, str]]  # start seconds, end seconds, Harte label
_BEATS_PER_BAR = 4
_TEMPO_TOLERANCE = 0.03  # singers who follow a click still breathe
_LONGEST_CHART_BYTES = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SheetWishes:
    """What somebody knows of the song beforehand; the rest is read out of the vocal."""

    tempo_bpm: float | None = None  # of four beats in a bar
    chart: Chart | None = None

    def __post_init__(self) -> None:
        if self.tempo_bpm is not None and not 55 <= self.tempo_bpm <= 210:
            raise ConfigError(f"the tempo must be from 55 to 210 beats per minute, got {self.tempo_bpm:g}")


def read_chart(path: str | Path) -> Chart:
    """Read a chord chart: a line "start end chord" per chord, in seconds, as "0.0 2.4 C:maj" or "N" for none.

    Raises DataError that names the line for anything else.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _LONGEST_CHART_BYTES:
            raise DataError(f"{path} is too long for a chord chart; give lines such as '0.0 2.4 C:maj'")
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"cannot read the chords {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is no text in UTF-8; give lines such as '0.0 2.4 C:maj'") from error
    chart: Chart = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            start, end, label = line.split()
            entry = (float(start), float(end), label)
            chords_of_blocks([(0.0, 1.0, label)], 1, 1.0)
        except (ValueError, DataError) as error:
            raise DataError(f"{path}, line {number}: {line.strip()!r} is not 'start end chord'") from error
        if not 0 <= entry[0] < entry[1] < float("inf"):
            raise DataError(f"{path}, line {number}: a chord must begin at 0 or later and end after that")
        chart.append(entry)
    if not chart:
        raise DataError(f"{path} has no chords; give lines such as '0.0 2.4 C:maj'")
    return chart


def make_sheet(lm: DualTrackLM, vocal_codes: Tensor, rate_hz: float, wishes: SheetWishes) -> Tensor | None:
    """Return the sheet [frames, COLUMNS] of vocal codes [frames]: read, with what is wished in its place.

    None where the model knows no sheets; ConfigError if something was wished of it.
    """
    limits: dict[str, Any] = {}
    if wishes.tempo_bpm is not None:
        bar = 60 * _BEATS_PER_BAR / wishes.tempo_bpm
        limits["bar_seconds"] = (bar * (1 - _TEMPO_TOLERANCE), bar * (1 + _TEMPO_TOLERANCE))
    sheet = lm.read_sheet(vocal_codes[None].to(lm.device), **limits)
    if sheet is None:
        if wishes != SheetWishes():
            raise ConfigError("this model plays from no lead sheet; leave out --tempo and --chords")
        return None
    sheet = sheet[0].cpu()
    if wishes.chart is not None:
        frames = len(sheet)
        chords = chords_of_blocks(wishes.chart, frames, rate_hz)
        written = write_sheet(np.full(frames, UNKNOWN), chords)
        middles = (np.arange(frames) + 0.5) / rate_hz
        is_charted = np.zeros(frames, dtype=bool)
        for start, end, _ in wishes.chart:
            is_charted |= (middles >= start) & (middles < end)
        charted, columns = torch.from_numpy(is_charted)[:, None], [CHORD, CHORD_TRUST]
        sheet[:, columns] = torch.where(charted, written[:, columns], sheet[:, columns])
    return sheet


def describe_sheet(sheet: Tensor | None, rate_hz: float) -> dict[str, Any] | None:
    """Return the part of report.json that says what the band was shown."""
    if sheet is None:
        return None
    places, chords = sheet[:, PLACE].numpy(), sheet[:, CHORD].numpy()
    known = (places[1:] != UNKNOWN) & (places[:-1] != UNKNOWN)
    lines = np.flatnonzero(known & (places[1:] < places[:-1])) + 1
    bars = np.diff(lines) / rate_hz
    edges = [0, *(np.flatnonzero(np.diff(chords)) + 1).tolist(), len(chords)]
    return {
        "trust": {"bars": _mean_trust(sheet[:, PLACE_TRUST]), "chords": _mean_trust(sheet[:, CHORD_TRUST])},
        "tempo_bpm": round(float(60 * _BEATS_PER_BAR / np.median(bars)), 2) if len(bars) else None,
        "bar_lines_seconds": [round(line / rate_hz, 3) for line in lines.tolist()],
        "chords": [
            [round(begin / rate_hz, 3), round(end / rate_hz, 3), _name(int(chords[begin]))]
            for begin, end in zip(edges[:-1], edges[1:], strict=True)
            if begin < end
        ],
    }


def _mean_trust(levels: Tensor) -> float | None:
    """How sure the reader was on the whole: 0 guessed, 1 written."""
    known = levels[levels != UNKNOWN].float()
    return round(float(known.mean()) / WRITTEN, 3) if len(known) else None


def _name(chord: int) -> str:
    return "?" if chord == UNKNOWN else CHORD_NAMES[chord]
