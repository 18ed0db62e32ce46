"""The picture of guidance: how well accompaniments fit by its strength."""

from collections.abc import Mapping
from pathlib import Path

from matplotlib.figure import Figure

from duotok.recipes.research.plots import COLORS, save_figure

# guidance -> (mean, standard error)
Curve = Mapping[float, tuple[float, float]]
_UNITS = {"in_key": "sung frames in the band's key (0 to 1)", "harmony": "harmony (1 = chance)"}
_COLORS = {"tokens": COLORS["accompaniment"], "sound": COLORS["vocal"]}


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
