"""The measured quality of the sound as figures, as a Markdown page and as a picture."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from duotok.recipes.evaluation.distances import Anchors
from duotok.tokenizer.common.files import whole_file

# Sound -> what it is. The last five are references.
SOUNDS = {
    "vae": "VAE alone",
    "round_trip": "tokens, round trip",
    "told_round_trip": "tokens and chart, round trip",
    "generated": "generated for the vocal",
    "original": "the original itself",
    "shuffled": "another song's original",
    "other_style": "other styles' originals",
    "random": "white noise",
    "silent": "silence",
}
# Measure -> heading, digits, what is good.
MEASURES = {
    "chroma_correlation": ("chroma correlation", 2, "1"),
    "fine_structure_50_300_hz": ("fine structure 50-300 Hz", 2, "1"),
    "fine_structure_300_1000_hz": ("fine structure 300-1000 Hz", 2, "1"),
    "fine_structure_1000_3000_hz": ("fine structure 1000-3000 Hz", 2, "1"),
    "log10_mel_l1": ("log10-mel L1", 3, "0"),
    "mel_distance": ("mel distance", 2, "0"),
    "pesq": ("PESQ", 2, "4.64"),
    "stoi": ("STOI", 2, "1"),
    "stereo_width_error_db": ("stereo width error (dB)", 2, "0"),
    "level_error_lu": ("level error (LU)", 2, "0"),
    "frechet": ("Frechet distance", 2, "0"),
    "frechet_all": ("Frechet distance, all patches", 2, "0"),
    "kernel_distance": ("kernel distance x 1000", 0, "0"),
    "frechet_standardized": ("Frechet distance, standardized", 1, "0"),
    "spread": ("spread over the true one", 2, "1"),
    "entropy": ("entropy of codes over the true one", 2, "1"),
    "distinct_4_grams": ("distinct 4-grams of codes over the true ones", 2, "1"),
    "onsets_per_beat": ("onsets per beat", 2, "the original's"),
    "bars_with_drums": ("bars with drums", 2, "the original's"),
    "bars_with_bass": ("bars with bass", 2, "the original's"),
    "bars_with_chords": ("bars with chords", 2, "the original's"),
}
_PLAYING = ("onsets_per_beat", "bars_with_drums", "bars_with_bass", "bars_with_chords")
# P table 4: the round trip through DuoTok's tokens.
PAPER = {"vocal": {"pesq": 1.76, "stoi": 0.55, "mel_distance": 0.81}, "accompaniment": {"mel_distance": 1.14}}
NOTES = """\
Means over the excerpts, with half the width of their 95 % intervals (Student's t). The generated sound, the
round trip and the references are compared at the level of the original, as codes do not know it; the level
error is taken before that, and is an absolute value, as the stereo width error is. Mel distance: the one of
descript-audio-codec's evaluation (two mel spectrograms, log10 of squared magnitudes plus magnitudes); the
paper does not define its own. Frechet distance: from the originals of the same excerpts, for features of the
tagger musicnn, between a few patches of 3 s, the same ones of both sides. A round trip is the same music: it
can come to 0. Another song's original cannot: so far from each other lie two samples, as small, of one and
the same corpus, and a generated band can at best come to this. The distance of all patches has no such row,
as all other songs are the same set. Kernel distance: of the same features, unbiased, from the accompaniments
of all items; the standardized Frechet distance as well, on features over their deviation there. Of other
styles: between random halves of the styles. Spread: mean distance between the mean features of two excerpts;
entropy and 4-grams are of the generated codes. Bars with a stem are heard by energy: noise that comes in
above 8 kHz, what lasts below 120 Hz, what lasts between 250 and 1000 Hz. A width below -40 dB of side over
mid counts as -40 dB. Paper: table 4, round trip through a 0.4 B decoder and other songs."""


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measure over the excerpts."""

    mean: float
    margin: float = math.nan  # half the width of its 95 % interval; NaN where it is a single number


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Everything that was measured."""

    values: Mapping[str, Mapping[str, Mapping[str, Value]]]  # track -> sound -> measure
    anchors: Anchors | None
    excerpts: int
    seconds: float
    left_out: tuple[str, ...]  # what could not be measured, and why

    def figures(self) -> dict[str, float]:
        """Flat figures; of the original itself only what it plays."""
        found: dict[str, float] = {"excerpts": self.excerpts, "excerpt_seconds": self.seconds}
        if self.anchors is not None:
            found |= self.anchors.figures()
        for track, sounds in self.values.items():
            for sound, measures in sounds.items():
                for name, value in measures.items():
                    # Only accompaniments have kernel distances.
                    own = name == "kernel_distance"
                    if sound != "original" or name in _PLAYING:
                        found[f"{name}_{sound}" if own else f"{track}_{sound}_{name}"] = value.mean
        return found


def render_quality(quality: Quality) -> str:
    """The Markdown page: a table per track, the anchors, what was left out."""
    lines = ["# Quality of the sound", "", f"{quality.excerpts} test excerpts of {quality.seconds:g} s."]
    for track, sounds in quality.values.items():
        measures = [name for name in MEASURES if any(name in found for found in sounds.values())]
        headings = [f"{MEASURES[name][0]}" for name in measures]
        lines += ["", f"## {track.capitalize()}", "", f"| | {' | '.join(headings)} |"]
        lines.append(f"|---|{'---:|' * len(measures)}")
        lines.append(f"| *perfect* | {' | '.join(MEASURES[name][2] for name in measures)} |")
        for sound, found in sounds.items():
            cells = [_cell(found, name) for name in measures]
            lines.append(f"| {SOUNDS[sound]} | {' | '.join(cells)} |")
        paper = [f"{PAPER[track][name]:g}" if name in PAPER[track] else "" for name in measures]
        lines.append(f"| *paper, round trip* | {' | '.join(paper)} |")
    if quality.anchors is not None:
        anchors = quality.anchors
        lines += [
            "",
            "## What a Frechet distance means",
            "",
            f"Between original accompaniments, {anchors.patches} patches of 3 s a side (as in the column "
            f"Frechet distance), mean over random draws, {len(anchors.styles)} styles:",
            "",
            "| two random halves of | distance |",
            "|---|---:|",
            f"| the same style | {anchors.same_style:.2f} |",
            f"| all songs | {anchors.same_corpus:.2f} |",
            f"| different styles | {anchors.other_style:.2f} |",
        ]
    lines += ["", NOTES.replace("\n", " ")]
    lines += [f"Left out: {reason}." for reason in quality.left_out]
    return "\n".join(lines) + "\n"


def _cell(found: Mapping[str, Value], name: str) -> str:
    if name not in found:
        return "-"
    value, digits = found[name], MEASURES[name][1]
    margin = "" if math.isnan(value.margin) else f" ± {value.margin:.{digits}f}"
    return f"{value.mean:.{digits}f}{margin}"


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
    for offset, (track, found) in zip((-0.2, 0.2), quality.values.items(), strict=False):
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
