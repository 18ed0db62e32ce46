"""The measured quality as a Markdown table and as JSON."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from duotok.recipes.evaluation.quality_result import Quality, Value
from duotok.recipes.evaluation.quality_sounds import SOUNDS
from duotok.tokenizer.common.files import write_json, write_text

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
}
# P table 4: the round trip through DuoTok's tokens.
PAPER = {
    "vocal": {"pesq": 1.76, "stoi": 0.55, "mel_distance": 0.81},
    "accompaniment": {"mel_distance": 1.14},
}
NOTES = """\
Means over the excerpts, with half the width of their 95 % intervals (Student's t). The generated sound, the
round trip and the references are compared at the level of the original, as codes do not know it; the level
error is taken before that, and is an absolute value, as the stereo width error is. Mel distance: the one of
descript-audio-codec's evaluation (two mel spectrograms, log10 of squared magnitudes plus magnitudes); the
paper does not define its own. Frechet distance: from the originals of the same excerpts, for features of the
tagger musicnn; another song's original has none, as all of them are one set of songs. A width below -40 dB
of side over mid counts as -40 dB. Paper: table 4, round trip through a 0.4 B decoder and other songs."""


def write_quality(quality: Quality, folder: Path) -> None:
    """Write quality.md and quality.json into a folder; raises DataError where that fails."""
    write_json(folder / "quality.json", describe_quality(quality))
    write_text(folder / "quality.md", render_quality(quality))


def describe_quality(quality: Quality) -> dict:
    """Everything, ready for JSON; a number that is not there is null."""
    return {
        "excerpts": quality.excerpts,
        "excerpt_seconds": quality.seconds,
        "left_out": list(quality.left_out),
        "frechet_anchors": None if quality.anchors is None else asdict(quality.anchors),
        "tracks": {
            track: {
                sound: {name: _describe(value) for name, value in measures.items()}
                for sound, measures in sounds.items()
            }
            for track, sounds in quality.values.items()
        },
    }


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


def _describe(value: Value) -> dict:
    return {
        "mean": round(value.mean, 5),
        "margin": None if math.isnan(value.margin) else round(value.margin, 5),
        "count": value.count,
    }
