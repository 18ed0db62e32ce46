"""A song as a picture: the waves of voice and band with its bars, chords and sections drawn over them.

SVG whose text and lines stand at shares of its width, so that it is sharp at any width and its letters are
never stretched; only the waves are. Colours are the page's (song_page.html).
"""

import html
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import soundfile
from torch import Tensor

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ

_COLUMNS_PER_SECOND, _MOST_COLUMNS, _FEWEST_COLUMNS = 40, 4000, 400
_BLOCK_SAMPLES = 1 << 18
# Rows from above, in pixels: what stands at which height.
_SECTION_Y, _CHORD_Y, _VOICE_Y, _BAND_Y, _TIME_Y, _HEIGHT = 0, 20, 46, 108, 170, 186
_LANE = 60
_PIXELS_PER_CHORD, _PIXELS_PER_SECOND = 30, 14  # a chord's name and half a bar need so much at least
_WIDEST_PIXELS = 12_000
_TIME_STEPS = (1, 2, 5, 10, 15, 30, 60)  # seconds between times below
_TIME_PIXELS = 48


def wave_peaks(wave: Tensor) -> np.ndarray:
    """Return the highest level of a wave [channels, samples] in each column of its picture [columns]."""
    loud = wave.abs().amax(dim=0).numpy()
    return _pool(loud, _count_columns(len(loud)))


def file_peaks(path: Path) -> np.ndarray:
    """Return the same of a sound file that this project has written, read in blocks."""
    with soundfile.SoundFile(path) as file:
        columns = _count_columns(file.frames)
        loud = [
            np.abs(block).max(axis=1)
            for block in file.blocks(_BLOCK_SAMPLES, dtype="float32", always_2d=True)
        ]
    return _pool(np.concatenate(loud), columns)


def draw_song(report: Mapping[str, Any], voice: np.ndarray, band: np.ndarray) -> str:
    """Return an <svg> of a song; report: report.json or one of its variations; peaks of voice and band."""
    seconds, sheet = float(report["seconds"]), report.get("lead_sheet") or {}
    chords = sheet.get("chords") or report["chords"]
    bars = sheet.get("bar_lines_seconds") or []
    narrowest = min((end - start for start, end, _ in chords), default=seconds)
    width = min(_WIDEST_PIXELS, seconds * max(_PIXELS_PER_SECOND, _PIXELS_PER_CHORD / max(narrowest, 0.5)))
    height = max(float(voice.max(initial=0)), float(band.max(initial=0)), 1e-3)
    parts = [
        *(_draw_section(section, seconds) for section in sheet.get("sections") or ()),
        *(
            f'<line class="bar" x1="{at / seconds:.3%}" x2="{at / seconds:.3%}" y1="44" y2="{_TIME_Y}"/>'
            for at in bars
        ),
        _draw_wave(voice / height, "voice", _VOICE_Y),
        _draw_wave(band / height, "band", _BAND_Y),
        *(_draw_chord(start, end, shown_chord(name), seconds) for start, end, name in chords),
        *_draw_times(seconds, width),
        f'<text class="lane" x="4" y="{_VOICE_Y + 12}">voice</text>',
        f'<text class="lane" x="4" y="{_BAND_Y + 12}">band</text>',
    ]
    return (
        f'<svg class="song" role="img" aria-label="{html.escape(describe_song(report))}" '
        f'style="width:max(100%,{width:.0f}px);height:{_HEIGHT}px">{"".join(parts)}</svg>'
    )


def describe_song(report: Mapping[str, Any]) -> str:
    """Return the picture in words."""
    sheet = report.get("lead_sheet") or {}
    bars, sections = len(sheet.get("bar_lines_seconds") or ()), sheet.get("sections") or ()
    told = [f"{report['seconds']:.1f} seconds", f"{bars} bar lines" if bars else ""]
    told.append(", ".join(f"{name} {letter} from {start:.1f} s" for start, _, name, letter in sections))
    names = [shown_chord(name) for *_, name in sheet.get("chords") or report["chords"]]
    told.append(f"chords {' '.join(names[:64])}" if names else "")
    return "Voice and band: " + "; ".join(filter(None, told))


def shown_chord(label: str) -> str:
    """Return a chord as lead sheets have it: "Eb:min" is Ebm, "N" a dash."""
    if label in ("N", "?", "X"):
        return "–" if label == "N" else "?"
    root, _, kind = label.partition(":")
    return root + {"maj": "", "min": "m"}.get(kind, kind)


def _draw_section(section: tuple[float, float, str, str], seconds: float) -> str:
    start, end, name, letter = section
    place = f'x="{start / seconds:.3%}" y="{_SECTION_Y}" width="{(end - start) / seconds:.3%}"'
    shade = sum(map(ord, letter)) % 4
    return (
        f'<rect class="section shade{shade}" {place} height="{_TIME_Y}"/><svg {place} height="18">'
        f'<text class="name" x="4" y="14">{html.escape(f"{name} {letter}")}</text></svg>'
    )


def _draw_chord(start: float, end: float, name: str, seconds: float) -> str:
    # A picture of its own cuts off what does not fit beside the next one.
    place = f'x="{start / seconds:.3%}" y="{_CHORD_Y}" width="{(end - start) / seconds:.3%}"'
    return (
        f'<svg {place} height="24"><rect class="chord" width="100%" height="23" rx="3"/>'
        f'<text class="chord-name" x="5" y="17">{html.escape(name)}</text></svg>'
    )


def _draw_wave(peaks: np.ndarray, kind: str, y: int) -> str:
    """One lane: the outline of a wave, the upper half of it mirrored."""
    half = 500
    tops = np.round(np.maximum(peaks * half, 4)).astype(int)
    there = " ".join(f"{x},{half - top}" for x, top in enumerate(tops))
    back = " ".join(f"{x},{half + top}" for x, top in reversed(list(enumerate(tops))))
    return (
        f'<svg x="0" y="{y}" width="100%" height="{_LANE}" viewBox="0 0 {max(len(peaks) - 1, 1)} {2 * half}" '
        f'preserveAspectRatio="none"><polygon class="wave {kind}" points="{there} {back}"/></svg>'
    )


def _draw_times(seconds: float, width: float) -> list[str]:
    step = next((step for step in _TIME_STEPS if step * width / seconds >= _TIME_PIXELS), _TIME_STEPS[-1])
    return [
        f'<text class="time" x="{at / seconds:.3%}" dx="{2 if at == 0 else -8}" y="{_HEIGHT - 4}">'
        f"{at // 60}:{at % 60:02d}</text>"
        for at in range(0, int(seconds - step / 3) + 1, step)
    ]


def _count_columns(samples: int) -> int:
    columns = round(samples / SAMPLE_RATE_HZ * _COLUMNS_PER_SECOND)
    return min(max(columns, _FEWEST_COLUMNS), _MOST_COLUMNS, max(samples, 1))


def _pool(loud: np.ndarray, columns: int) -> np.ndarray:
    edges = np.linspace(0, len(loud), columns + 1).astype(int)
    return np.array([loud[first:last].max(initial=0.0) for first, last in pairwise(edges)])


def chart_text(chords: Sequence[Sequence[Any]], earlier_seconds: float = 0.0) -> str:
    """Return chords [start, end, label] as the lines of a chart, with all times earlier by so much."""
    rows = [(start - earlier_seconds, end - earlier_seconds, label) for start, end, label in chords]
    lines = [f"{max(start, 0.0):.2f} {end:.2f} {label}" for start, end, label in rows[:-1] if end > 0]
    for start, end, label in rows[-1:]:  # until the very end, not a hundredth before it
        lines.append(f"{max(start, 0.0):.2f} {math.ceil(100 * end) / 100:.2f} {label}")
    return "\n".join(line for line in lines if not line.endswith("?"))
