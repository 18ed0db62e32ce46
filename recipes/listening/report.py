"""Opinions as a Markdown table, JSON and a picture."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure

from duotok.recipes.listening.opinion import Opinion
from duotok.recipes.listening.page import SCALE
from duotok.recipes.research.plots import save_figure
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_json

TABLE, FIGURES, PICTURE = "mos.md", "mos.json", "mos.png"


def write_report(opinions: Sequence[Opinion], folder: Path, page: str) -> None:
    """Write mos.md, mos.json and mos.png; raises DataError where that fails."""
    write_json(
        folder / FIGURES,
        {
            "page": page,
            "systems": {
                opinion.system: {
                    name: None if isinstance(value, float) and math.isnan(value) else value
                    for name, value in asdict(opinion).items()
                    if name != "system"
                }
                for opinion in opinions
            },
        },
    )
    try:
        (folder / TABLE).write_text(render_table(opinions), encoding="utf-8")
    except OSError as error:
        raise DataError(f"cannot write {folder / TABLE}: {error.strerror or error}") from error
    draw_opinions(opinions, folder / PICTURE)


def render_table(opinions: Sequence[Opinion]) -> str:
    """The Markdown table, best system first."""
    lines = [
        "| system | MOS | 95 %, over ratings | 95 %, listeners and clips drawn anew "
        "| ratings | listeners | clips |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for found in opinions:
        margin = "-" if math.isnan(found.margin) else f"± {found.margin:.2f}"
        lines.append(
            f"| {found.system} | {found.mean:.2f} | {margin} | {found.low:.2f} to {found.high:.2f} "
            f"| {found.ratings} | {found.raters} | {found.clips} |"
        )
    return "\n".join(lines) + "\n"


def draw_opinions(opinions: Sequence[Opinion], path: Path) -> None:
    """Write a picture of the means with both intervals, and of how often each grade was given."""
    figure = Figure(figsize=(11, 1.9 + 0.5 * len(opinions)), layout="constrained")
    means, grades = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(opinions))
    for place, found in zip(places, opinions, strict=True):
        means.plot(
            [found.low, found.high], [place, place], color="#7fb3c8", linewidth=8, solid_capstyle="butt"
        )
        means.errorbar(
            found.mean,
            place,
            xerr=None if math.isnan(found.margin) else found.margin,
            marker="o",
            capsize=4,
            color="#1f6f8b",
        )
        means.annotate(
            f"{found.mean:.2f}", (found.mean, place), (0, 9), textcoords="offset points", ha="center"
        )
    means.plot([], [], color="#7fb3c8", linewidth=8, label="95 %, listeners and clips drawn anew")
    means.errorbar([], [], xerr=[], marker="o", capsize=4, color="#1f6f8b", label="mean, 95 % over ratings")
    means.set_xlim(0.9, 5.1)
    means.set_xticks([grade for grade, _, _ in SCALE], [f"{grade}\n{name}" for grade, name, _ in SCALE])
    means.set_yticks(places, [found.system for found in opinions])
    means.set_ylim(len(opinions) - 0.4, -0.6)
    means.set_title("Mean opinion score")
    shares = np.array([np.array(found.counts) / found.ratings for found in opinions])
    left = np.zeros(len(opinions))
    for column, (grade, name, _) in enumerate(sorted(SCALE)):
        color = colormaps["RdYlGn"](column / (len(SCALE) - 1))
        grades.barh(places, 100 * shares[:, column], 0.6, left=left, color=color, label=f"{grade} {name}")
        left += 100 * shares[:, column]
    grades.set_xlim(0, 100)
    grades.set_xlabel("ratings (%)")
    grades.set_title("Grades given")
    for axes in (means, grades):
        axes.grid(axis="x", alpha=0.3)
    handles, labels = means.get_legend_handles_labels()
    more_handles, more_labels = grades.get_legend_handles_labels()
    figure.legend(
        [*handles, *more_handles], [*labels, *more_labels], loc="outside lower center", ncols=4, fontsize=8
    )
    save_figure(figure, path)
