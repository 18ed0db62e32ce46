"""The trials of `steps` as a Markdown table and a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from duotok.recipes.evaluation.sound_quality import LIVELINESS, MEASURES, worst_loss_percent
from duotok.recipes.research.plots import save_figure

ALLOWED_LOSS_PERCENT = 5.0
Row = dict[str, Any]


def find_reference(rows: Sequence[Row], decoder: str) -> Row:
    """The row with the most steps of a decoder under its first schedule: what few steps are measured on."""
    own = [row for row in rows if row["decoder"] == decoder]
    first = (own[0]["solver"], own[0]["shift"])
    return max((row for row in own if (row["solver"], row["shift"]) == first), key=lambda row: row["steps"])


def add_losses(rows: Sequence[Row]) -> None:
    """Give every row its loss against the reference of its decoder: "worst_loss_percent"."""
    for row in rows:
        row["worst_loss_percent"] = worst_loss_percent(row, find_reference(rows, row["decoder"]))


def choose_best(rows: Sequence[Row], decoder: str) -> Row | None:
    """The row with the fewest runs of the network within ALLOWED_LOSS_PERCENT of the reference on every
    measure, that is at least as lively as the reference less the same share; None where only that one is."""
    reference = find_reference(rows, decoder)
    liveliest = reference[LIVELINESS] * (1 - ALLOWED_LOSS_PERCENT / 100)
    fit = [
        row
        for row in rows
        if row["decoder"] == decoder
        and row["network_runs"] < reference["network_runs"]
        and row["worst_loss_percent"] <= ALLOWED_LOSS_PERCENT
        and row[LIVELINESS] >= liveliest
    ]
    return min(fit, key=lambda row: (row["network_runs"], row["worst_loss_percent"]), default=None)


def schedule_of(row: Row) -> str:
    """Solver and shift of a row as the command line names them."""
    return row["solver"] if row["shift"] == 1 else f"{row['solver']}:{row['shift']:g}"


def render_table(rows: Sequence[Row]) -> str:
    """The Markdown table, and below it the best few-step setting of each decoder."""
    heads = [
        "decoder",
        "objective",
        "solver",
        "steps",
        "network runs",
        *(measure.label for measure in MEASURES),
        "movement",
        "worst loss (%)",
        "diffusion s/s",
        "the same, processor s/s",
    ]
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            row["decoder"],
            row["objective"],
            schedule_of(row),
            str(row["steps"]),
            str(row["network_runs"]),
            *(f"{row[measure.name]:.3f}" for measure in MEASURES),
            f"{row[LIVELINESS]:.2f}",
            f"{row['worst_loss_percent']:+.1f}",
            f"{row['diffusion_seconds_per_second']:.3f}",
            f"{row['diffusion_processor_seconds_per_second']:.3f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    for decoder in dict.fromkeys(row["decoder"] for row in rows):
        reference, best = find_reference(rows, decoder), choose_best(rows, decoder)
        told = f"- {decoder}: reference {schedule_of(reference)}, {reference['steps']} steps; "
        if best is None:
            told += f"no fewer steps stay within {ALLOWED_LOSS_PERCENT:g} % of it on every measure"
        else:
            told += (
                f"fewest within {ALLOWED_LOSS_PERCENT:g} % on every measure: {schedule_of(best)}, "
                f"{best['steps']} steps ({best['worst_loss_percent']:+.1f} %)"
            )
        lines.append(told)
    return "\n".join(lines) + "\n"


def draw_steps(rows: Sequence[Row], title: str, path: Path) -> None:
    """Quality against runs of the network (above) and against processor seconds (below).

    The gray band is what the reference of the first decoder allows.
    """
    shown = [(measure.name, measure.label) for measure in (MEASURES[0], MEASURES[2], MEASURES[4])]
    shown.append((LIVELINESS, "movement of mel levels (1 = the recording's)"))
    figure = Figure(figsize=(16, 8), layout="constrained")
    grid = figure.subplots(2, len(shown), squeeze=False)
    units = (
        ("network_runs", "runs of the network per window"),
        ("diffusion_processor_seconds_per_second", "processor seconds of diffusion per second of audio"),
    )
    for line, (unit, label) in enumerate(units):
        for column, (name, title_of_measure) in enumerate(shown):
            axes = grid[line, column]
            for key in dict.fromkeys((row["decoder"], schedule_of(row)) for row in rows):
                curve = sorted(
                    (row[unit], row[name]) for row in rows if (row["decoder"], schedule_of(row)) == key
                )
                axes.plot(*zip(*curve, strict=True), marker="o", markersize=4, label=" ".join(key))
            # Within the allowed loss of the first decoder's reference; a narrow axis would blow trifles up.
            reference = find_reference(rows, rows[0]["decoder"])[name]
            margin = reference * ALLOWED_LOSS_PERCENT / 100
            axes.axhspan(reference - margin, reference + margin, color="gray", alpha=0.15, linewidth=0)
            axes.set_xscale("log")
            axes.minorticks_off()
            axes.set_xlabel(label)
            axes.set_title(title_of_measure, fontsize=10)
            axes.grid(alpha=0.3)
    runs = sorted({row["network_runs"] for row in rows})
    for axes in grid[0]:
        axes.set_xticks(runs, [str(count) for count in runs])
    for axes in grid[1]:
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter("{x:g}")
    handles, labels = grid[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(6, len(labels)), fontsize=9)
    figure.suptitle(title)
    save_figure(figure, path)
