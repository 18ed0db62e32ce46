"""Draw the curves of one or several training runs as PNG, one panel per kind of figure.

Run: python -m duotok.recipes.training.plot runs/small/lm [runs/small/lm2 ...] --out curves.png
Each RUN is the folder of a run, or its log.jsonl. Thick lines are smoothed, what was logged is behind them.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError
from duotok.tokenizer.common.files import WriteError, whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    Rows = list[dict[str, float]]

COLUMNS = 3
DOTS_PER_INCH = 110
LOGARITHMIC = ("gradient_norm",)
EXACT = ("learning_rate", "peak_memory_gb")  # nothing to smooth
LINE_STYLES = ("-", "--", ":", "-.")


def panel_of(name: str) -> str:
    """Return the panel a figure is drawn in; figures of one panel are of the same kind.

    Losses of cases ("mel/vocal") go with their whole ("mel"), those of tracks ("vocal_nats") with each other,
    by their last word; validation figures ("validation/cnbpt/unconditional") by their metric.
    """
    from duotok.recipes.training.log import VALIDATION, section_of

    section = section_of(name)
    if section == "validation":
        return f"{VALIDATION}{name.removeprefix(VALIDATION).split('/')[0]}"
    if section != "loss":
        return name
    return name.split("/")[0].rsplit("_", 1)[-1]


def smooth(values: np.ndarray, share: float) -> np.ndarray:
    """Return the moving average of values [rows] over a share of the rows, unbiased at the start."""
    span = max(1.0, share * len(values))
    keep = 1 - 1 / span
    smoothed, total, weight = np.empty(len(values)), 0.0, 0.0
    for row, value in enumerate(values):
        total, weight = keep * total + value, keep * weight + 1
        smoothed[row] = total / weight
    return smoothed


def draw_runs(runs: "dict[str, Rows]", path: Path, *, over: str, smoothing: float) -> list[str]:
    """Draw runs by name into a PNG file; return the panels' names."""
    from matplotlib.figure import Figure

    from duotok.recipes.training.log import PLACE

    names = list(dict.fromkeys(n for rows in runs.values() for row in rows for n in row if n not in PLACE))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(panel_of(name), []).append(name)
    order = sorted(panels, key=lambda panel: _rank(panel, panels[panel]))
    lines = -(-len(order) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.4 * lines + 0.4), layout="constrained")
    grid: Any = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, order, strict=False):
        _draw_panel(axes, panel, panels[panel], runs, over=over, smoothing=smoothing)
    for axes in grid.flat[len(order) :]:
        axes.remove()
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    try:
        with whole_file(path) as temporary:
            figure.savefig(temporary, dpi=DOTS_PER_INCH, format=path.suffix.removeprefix("."))
    except (WriteError, ValueError) as error:
        raise DuoTokError(f"cannot write {path}: {error}; give another --out, ending in .png") from error
    return order


def _rank(panel: str, names: list[str]) -> tuple[int, str]:
    """The total loss first, then other losses, validation, and how the training went."""
    from duotok.recipes.training.log import section_of

    sections = ("loss", "validation", "optimizer", "speed")
    return (-1, "") if panel == "total" else (sections.index(section_of(names[0])), panel)


def _draw_panel(
    axes: "Axes", panel: str, names: list[str], runs: "dict[str, Rows]", *, over: str, smoothing: float
) -> None:
    values: list[float] = []
    is_exact = panel in EXACT or panel.startswith("validation/")
    for number, (run, rows) in enumerate(runs.items()):
        for place, name in enumerate(names):
            found = [row for row in rows if name in row]
            if not found:
                continue
            # One run: a colour per figure. Several: a colour per run, a style of line per figure.
            color = f"C{(place if len(runs) == 1 else number) % 10}"
            style = "-" if len(runs) == 1 else LINE_STYLES[place % len(LINE_STYLES)]
            at = [row["step"] if over == "steps" else row.get("seconds", np.nan) / 60 for row in found]
            raw = np.array([row[name] for row in found])
            label = " ".join(([run] if len(runs) > 1 else []) + ([name] if len(names) > 1 else []))
            is_marked = "o" if len(raw) == 1 else None
            axes.plot(at, raw, color=color, linewidth=0.8, alpha=0.3)
            line = raw if is_exact else smooth(raw, smoothing)
            axes.plot(at, line, style, color=color, marker=is_marked, label=label)
            values.extend(raw[np.isfinite(raw)])
    axes.set_title(panel.replace("_", " "))
    axes.set_xlabel(over)
    axes.grid(alpha=0.3)
    if panel in LOGARITHMIC and min(values, default=0) > 0:
        axes.set_yscale("log")
    if len(names) > 1 or len(runs) > 1:
        axes.legend(fontsize=7, framealpha=0.6)


def name_runs(paths: Sequence[Path]) -> dict[str, Path]:
    """Name runs by their folders, with as much of the path as it takes to tell them apart."""
    folders = [path.resolve().parent if path.suffix == ".jsonl" else path.resolve() for path in paths]
    for length in range(1, max(len(folder.parts) for folder in folders) + 1):
        names = ["/".join(folder.parts[-length:]) for folder in folders]
        if len(set(names)) == len(names):
            return dict(zip(names, paths, strict=True))
    raise DuoTokError("the same run is given twice; give each once")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.training.plot", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG file (default: curves.png)")
    parser.add_argument("--over", choices=("steps", "minutes"), default="steps", help="default: steps")
    parser.add_argument(
        "--smooth", type=float, default=0.04, metavar="SHARE", help="of a run averaged over (default: 0.04)"
    )
    arguments = parser.parse_args(argv)
    if not 0 <= arguments.smooth <= 1:
        parser.error(f"--smooth must be in 0..1, got {arguments.smooth}")

    def draw() -> None:
        from duotok.recipes.training.log import read_log

        runs = {name: read_log(path) for name, path in name_runs(arguments.runs).items()}
        draw_runs(runs, arguments.out, over=arguments.over, smoothing=arguments.smooth)
        print(arguments.out)

    return guard(draw)


if __name__ == "__main__":
    sys.exit(main())
