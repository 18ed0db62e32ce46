"""Pictures of the probes, one PNG file each; dashed lines are the paper's numbers."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from duotok.recipes.research.plots import save_figure
from duotok.recipes.research.probe import MAJORITY, METHODS, ProbeResult
from duotok.recipes.research.probe_data import INPUTS
from duotok.recipes.research.tag_scores import TagScores
from duotok.recipes.research.tagging import PAPER_AP, PAPER_AUC, Tagging

METHOD_NAMES = {
    "majority": "no input (training shares)",
    "mel_linear": "mel statistics, linear",
    "codes_linear": "code vectors, linear",
    "codes_conformer": "code vectors, Conformer",
}
COLORS = {
    "majority": "#bbbbbb",
    "mel_linear": "#e0b04a",
    "codes_linear": "#7fb3c8",
    "codes_conformer": "#1f6f8b",
}


def draw_probe(found: ProbeResult, path: Path) -> None:
    """Accuracy and macro ROC-AUC of every label by what the probe sees."""
    figure = Figure(figsize=(15, 7.5), layout="constrained")
    grid = figure.subplots(2, len(INPUTS), sharex=True, sharey="row", squeeze=False)
    places = np.arange(len(found.labels))
    for column, seen in enumerate(INPUTS):
        keys = [MAJORITY, *((seen, method) for method in METHODS)]
        keys = [key for key in keys if any(key in found.scores[label.name] for label in found.labels)]
        width = 0.86 / len(keys)
        for number, key in enumerate(keys):
            scores = [found.scores[label.name][key] for label in found.labels]
            for axes, values, errors in (
                (grid[0, column], *_accuracies(scores)),
                (grid[1, column], [score.roc_auc for score in scores], None),
            ):
                bars = axes.bar(
                    places + (number - (len(keys) - 1) / 2) * width,
                    values,
                    width,
                    yerr=errors,
                    capsize=2,
                    color=COLORS[key[1]],
                    label=METHOD_NAMES[key[1]],
                )
                axes.bar_label(
                    bars,
                    [f"{value:.2f}" if value == value else "" for value in values],
                    fontsize=7,
                    padding=2,
                )
        grid[0, column].set_title(f"seen: {'both tracks' if seen == 'both' else seen}")
        counts = [found.scores[label.name][MAJORITY].recordings for label in found.labels]
        names = [
            f"{label.name}\n{len(label.classes)} classes,\n{count} items"
            for label, count in zip(found.labels, counts, strict=True)
        ]
        grid[1, column].set_xticks(places, names, fontsize=8)
        grid[1, column].axhline(0.5, color="black", linewidth=0.8, linestyle=":")
    grid[0, 0].set_ylabel("accuracy (0 to 1; bars: standard error)")
    grid[1, 0].set_ylabel("macro ROC-AUC (0.5 = chance)")
    for axes in grid.flat:
        axes.set_ylim(0, 1.12)
        axes.grid(axis="y", alpha=0.3)
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    figure.suptitle(
        f"What frozen codes say about the music: learned from {found.train_recordings} training items, "
        f"tested on {found.test_recordings} items of other songs"
    )
    save_figure(figure, path)


def draw_tagging(found: Tagging, path: Path) -> None:
    """Average precision and ROC-AUC of every tag by the Conformer probe."""
    conformer = found.scores["codes_conformer"]
    order = sorted(conformer.by_class, key=lambda index: conformer.by_class[index][0])
    figure = Figure(figsize=(11, 2.5 + 0.19 * len(order)), layout="constrained")
    precision, area = figure.subplots(1, 2, sharey=True)
    anchor = found.scores["majority"].by_class
    for axes, column, paper, mean, name in (
        (precision, 0, PAPER_AP, conformer.average_precision, "average precision"),
        (area, 1, PAPER_AUC, conformer.roc_auc, "ROC-AUC"),
    ):
        axes.barh(
            np.arange(len(order)),
            [conformer.by_class[index][column] for index in order],
            color=COLORS["codes_conformer"],
        )
        axes.plot(
            [anchor[index][column] for index in order],
            np.arange(len(order)),
            "|",
            color="#d1495b",
            markersize=8,
            label="no input",
        )
        axes.axvline(mean, color="black", label=f"mean over tags: {mean:.3f}")
        axes.axvline(paper, color="black", linestyle="--", label=f"paper: {paper}")
        axes.set_xlim(0, 1)
        axes.set_xlabel(f"{name} (0 to 1)")
        axes.legend(fontsize=8, loc="lower right")
        axes.grid(axis="x", alpha=0.3)
    precision.set_ylim(-0.6, len(order) - 0.4)
    precision.set_yticks(np.arange(len(order)), [found.tags[index] for index in order], fontsize=8)
    figure.suptitle(
        f"MagnaTagATune, {len(found.tags)} most frequent tags, Conformer on frozen code vectors "
        f"({found.clips['test']:,} test clips)"
    )
    save_figure(figure, path)


def _accuracies(scores: list[TagScores]) -> tuple[list[float], list[float]]:
    """Accuracies and their binomial standard errors; NaN for labels that are tags."""
    values = [float("nan") if score.accuracy is None else score.accuracy for score in scores]
    errors = [
        float(np.sqrt(value * (1 - value) / score.recordings))
        for value, score in zip(values, scores, strict=True)
    ]
    return values, errors
