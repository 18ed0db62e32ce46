"""What is known about the quality of the sound after it was measured, as figures and as a Markdown page."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from duotok.recipes.evaluation.distances import Anchors
from duotok.tokenizer.common.files import write_text

# Sound -> what it is. The last four are references.
SOUNDS = {
    "vae": "VAE alone",
    "round_trip": "tokens, round trip",
    "generated": "generated for the vocal",
    "original": "the original itself",
    "shuffled": "another song's original",
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
tagger musicnn; another song's original has none, as all of them are one set of songs. Kernel distance: of
the same features, unbiased, from the accompaniments of all test items. A width below -40 dB
of side over mid counts as -40 dB. Paper: table 4, round trip through a 0.4 B decoder and other songs."""


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
        """Flat figures; those of the original itself are left out."""
        found: dict[str, float] = {"excerpts": self.excerpts, "excerpt_seconds": self.seconds}
        if self.anchors is not None:
            found |= self.anchors.figures()
        for track, sounds in self.values.items():
            for sound, measures in sounds.items():
                for name, value in measures.items() if sound != "original" else ():
                    # Only accompaniments have kernel distances.
                    own = name == "kernel_distance"
                    found[f"{name}_{sound}" if own else f"{track}_{sound}_{name}"] = value.mean
        return found


def write_quality(quality: Quality, folder: Path) -> None:
    """Write quality.md into a folder; raises DataError where that fails."""
    write_text(folder / "quality.md", render_quality(quality))


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
