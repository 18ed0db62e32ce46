"""The pictures of the evaluation, one PNG file each: the measured quality, and fit by guidance."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duotok.recipes.evaluation.quality_report import MEASURES, PAPER, SOUNDS, Quality
from duotok.tokenizer.common.files import whole_file

COLORS = {
    "whole": "#1f6f8b",
    "first_5s": "#d1495b",
    "vocal": "#d1495b",
    "accompaniment": "#1f6f8b",
    "unconditional_vocal": "#d1495b",
    "unconditional_accompaniment": "#1f6f8b",
    "vocal_to_accompaniment": "#3a9d5d",
    "accompaniment_to_vocal": "#e08e45",
}
DOTS_PER_INCH = 110
_COLUMNS = 4
_ANCHORS = {
    "same_style": ("halves of one style", ":"),
    "same_corpus": ("halves of all songs", "-."),
    "other_style": ("halves of two styles", "--"),
}
# A reference far off would flatten what is to be seen: bars are cut here and told in numbers.
_LARGEST = {"level_error_lu": 12.0, "log10_mel_l1": 1.5, "mel_distance": 6.0, "stereo_width_error_db": 20.0}
# guidance -> (mean, standard error)
Curve = Mapping[float, tuple[float, float]]
_UNITS = {"in_key": "sung frames in the band's key (0 to 1)", "harmony": "harmony (1 = chance)"}
_COLORS = {"tokens": COLORS["accompaniment"], "sound": COLORS["vocal"]}


def draw_quality(quality: Quality, path: Path) -> None:
    """Write the picture as PNG."""
    sounds = [name for name in SOUNDS if any(name in found for found in quality.values.values())]
    measures = [
        name
        for name in MEASURES
        if any(name in found for track in quality.values.values() for found in track.values())
    ]
    lines = math.ceil(len(measures) / _COLUMNS)
    figure = Figure(figsize=(4.4 * _COLUMNS, 0.9 + (0.9 + 0.42 * len(sounds)) * lines), layout="constrained")
    grid = figure.subplots(lines, _COLUMNS, squeeze=False, sharey=True)
    for axes, measure in zip(grid.flat, measures, strict=False):
        _draw_measure(axes, quality, measure, sounds)
    for axes in grid.flat[len(measures) :]:
        axes.remove()
    grid[0, 0].set_yticks(np.arange(len(sounds)), [SOUNDS[sound] for sound in sounds])
    grid[0, 0].invert_yaxis()
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle(
        f"Quality of the sound ({quality.excerpts} test excerpts of {quality.seconds:g} s; "
        f"bars: 95 % intervals; black: the paper's round trip)"
    )
    save_figure(figure, path)


def _draw_measure(axes: Axes, quality: Quality, measure: str, sounds: list[str]) -> None:
    heading, digits, perfect = MEASURES[measure]
    for offset, (track, found) in zip((-0.2, 0.2), quality.values.items(), strict=True):
        present = [sound for sound in sounds if measure in found.get(sound, {})]
        values = [found[sound][measure] for sound in present]
        limit = _LARGEST.get(measure, math.inf)
        bars = axes.barh(
            [sounds.index(sound) + offset for sound in present],
            [min(value.mean, limit) for value in values],
            0.38,
            xerr=[0 if math.isnan(value.margin) or value.mean > limit else value.margin for value in values],
            color=COLORS[track],
            label=track,
        )
        axes.bar_label(bars, [f"{value.mean:.{digits}f}" for value in values], fontsize=7, padding=3)
        if measure in PAPER[track]:
            axes.plot(
                [PAPER[track][measure]] * 2,
                [sounds.index("round_trip") + offset - 0.2, sounds.index("round_trip") + offset + 0.2],
                color="black",
                linewidth=2,
            )
    if measure == "frechet" and quality.anchors is not None:
        for name, (label, style) in _ANCHORS.items():
            axes.axvline(
                getattr(quality.anchors, name), color="black", linewidth=1, linestyle=style, label=label
            )
        axes.legend(fontsize=7, loc="lower right", handles=axes.lines[-len(_ANCHORS) :])
    axes.set_title(f"{heading} (perfect: {perfect})", fontsize=10)
    axes.margins(x=0.15)
    axes.grid(axis="x", alpha=0.3)


def save_figure(figure: Figure, path: Path) -> None:
    """Write the picture as PNG, whole or not at all."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=DOTS_PER_INCH, format="png")


def draw_guidance(
    curves: Mapping[tuple[str, str], Curve], references: Mapping[str, float], title: str, path: Path
) -> None:
    """Draw in-key share and harmony by guidance.

    curves: (measure, source) -> curve, measure one of "in_key" and "harmony", source "tokens" or "sound";
    references: by measure what the corpus' own accompaniments reach, read from tokens.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    for axes, (measure, unit) in zip(figure.subplots(1, 2), _UNITS.items(), strict=True):
        for (name, source), curve in curves.items():
            if name != measure:
                continue
            strengths = sorted(curve)
            axes.errorbar(
                strengths,
                [curve[strength][0] for strength in strengths],
                yerr=[curve[strength][1] for strength in strengths],
                marker="o",
                capsize=3,
                color=_COLORS[source],
                label=f"read from {source}",
            )
            axes.set_xticks(strengths, [f"{strength:g}" for strength in strengths])
        label = "the corpus' own band, from tokens"
        axes.axhline(references[measure], linestyle="--", linewidth=1.2, color="black", label=label)
        axes.set_xlabel("guidance (1 = none)")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.suptitle(title)
    save_figure(figure, path)
