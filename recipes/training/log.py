"""The log of a run: rows to log.jsonl, TensorBoard and Weights & Biases, read back, and drawn as curves.

Run: python -m duotok.recipes.training.log runs/small/lm [runs/small/lm2 ...] --out curves.png
The PNG has one panel per kind of figure; thick lines are smoothed, what was logged is behind them.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.signal import lfilter

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Rows = list[dict[str, float]]

FILE_NAME = "log.jsonl"
PLACE = ("step", "seconds")  # where in the run a row belongs
OPTIMIZER = ("learning_rate", "gradient_norm")
SPEED = ("mfu", "peak_memory_gb")
VALIDATION = "validation/"
_DIGITS = {"seconds": 2, "learning_rate": 12}
COLUMNS, DOTS_PER_INCH = 3, 110
SMOOTHED_SHARE = 0.04  # of a run
EXACT = ("learning_rate", "peak_memory_gb")  # nothing to smooth
LINE_STYLES = ("-", "--", ":", "-.")


def section_of(name: str) -> str:
    """Return the kind of a figure of a row: place, optimizer, speed, validation or loss."""
    if name in PLACE:
        return "place"
    if name in OPTIMIZER:
        return "optimizer"
    if name in SPEED or name.endswith("_per_second"):
        return "speed"
    return "validation" if name.startswith(VALIDATION) else "loss"


class RunLog:
    """Writes the rows of one run folder; only the main process makes one that writes."""

    def __init__(self, out: Path, *, first_step: int, wandb: str, settings: dict[str, Any], on: bool) -> None:
        """first_step: steps already taken; settings: shown by Weights & Biases in its project `wandb`."""
        self._path = out / FILE_NAME
        self._on = on
        self._board: Any = None
        self._wandb_run: Any = None
        if wandb and find_spec("wandb") is None:
            raise ConfigError(f"the run is to log to {wandb!r}, but wandb is missing: pip install wandb")
        if on and self._path.exists():  # what a killed run or a full disk left of a row goes
            content = self._path.read_bytes()
            self._path.write_bytes(content[: content.rfind(b"\n") + 1])
        if on and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Rows that a killed run wrote after its last checkpoint are taken back.
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        if on and wandb:
            self._wandb_run = _start_wandb(out, wandb, settings)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb_run is not None:
            self._wandb_run.finish()

    def write(self, row: dict[str, float]) -> None:
        """Write one row; it has at least "step"."""
        if not self._on:
            return
        step = int(row["step"])
        rounded = {name: round(value, _DIGITS.get(name, 6)) for name, value in row.items()}
        sections = {name: "" if name.startswith(VALIDATION) else f"{section_of(name)}/" for name in row}
        tagged = {sections[name] + name: value for name, value in row.items() if name not in PLACE}
        try:
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(rounded) + "\n")
            if self._board is not None:
                for tag, value in tagged.items():
                    self._board.add_scalar(tag, value, step)
                self._board.flush()
        except OSError as error:
            raise DuoTokError(
                f"cannot write the log {self._path} ({error.strerror or error}); free some space, then run "
                "the same command again to go on from the last checkpoint"
            ) from error
        if self._wandb_run is not None:
            self._wandb_run.log(tagged, step=step)


def read_log(folder: Path) -> Rows:
    """Return the rows of a run; those that a resumed run took again replace the earlier ones."""
    path = folder / FILE_NAME if folder.is_dir() else folder
    rows: Rows = []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DuoTokError(f"cannot read {path}; give the folder of a training run") from error
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            step = row["step"]
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break  # half a line: being written, or of a killed run
            raise DuoTokError(f"{path}, line {number}, is not a row of a training log") from error
        while rows and rows[-1]["step"] >= step:
            rows.pop()
        rows.append(row)
    if not rows:
        raise DuoTokError(f"{path} holds no rows yet")
    return rows


def _start_wandb(out: Path, project: str, settings: dict[str, Any]) -> Any:
    wandb = import_module("wandb")
    name_file = out / "wandb_run.txt"  # so that a resumed run goes on in the same place
    if not name_file.exists():
        name_file.write_text(wandb.util.generate_id(), encoding="utf-8")
    try:
        return wandb.init(
            project=project,
            dir=str(out),
            id=name_file.read_text(encoding="utf-8").strip(),
            name=out.resolve().name,
            resume="allow",
            config=settings,
        )
    except (wandb.errors.Error, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"Weights & Biases does not start: {reason}; leave --wandb away") from error


def panel_of(name: str) -> str:
    """Return the panel a figure is drawn in; figures of one panel are of the same kind.

    Losses of cases ("mel/vocal") go with their whole ("mel"), those of tracks ("vocal_nats") with each other,
    by their last word; validation figures ("validation/cnbpt/unconditional") by their metric.
    """
    section = section_of(name)
    if section == "loss":
        return name.split("/")[0].rsplit("_", 1)[-1]
    return "/".join(name.split("/")[:2]) if section == "validation" else name


def smooth(values: np.ndarray, share: float = SMOOTHED_SHARE) -> np.ndarray:
    """Return the moving average of values [rows] over a share of the rows, unbiased at the start."""
    keep = 1 - 1 / max(1.0, share * len(values))
    total, weight = (lfilter([1.0], [1.0, -keep], each) for each in (values, np.ones(len(values))))
    return np.asarray(total) / weight


def draw_runs(runs: dict[str, Rows], path: Path) -> list[str]:
    """Draw runs by name into a PNG file; return the panels' names."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(n for rows in runs.values() for row in rows for n in row if n not in PLACE))
    panels: dict[str, list[str]] = {}
    for name in names:
        panels.setdefault(panel_of(name), []).append(name)
    order = sorted(panels, key=lambda panel: _rank(panel, panels[panel]))
    lines = -(-len(order) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.4 * lines + 0.4), layout="constrained")
    grid: Any = figure.subplots(lines, COLUMNS, squeeze=False)
    for axes, panel in zip(grid.flat, order, strict=False):
        _draw_panel(axes, panel, panels[panel], runs)
    for axes in grid.flat[len(order) :]:
        axes.remove()
    if len(runs) == 1:
        figure.suptitle(next(iter(runs)))
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except (OSError, ValueError) as error:
        raise DuoTokError(f"cannot write {path}: {error}; give another --out, ending in .png") from error
    return order


def _rank(panel: str, names: list[str]) -> tuple[int, str]:
    """The total loss first, then other losses, validation, and how the training went."""
    sections = ("loss", "validation", "optimizer", "speed")
    return (-1, "") if panel == "total" else (sections.index(section_of(names[0])), panel)


def _draw_panel(axes: "Axes", panel: str, names: list[str], runs: dict[str, Rows]) -> None:
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
            at = [row["step"] for row in found]
            raw = np.array([row[name] for row in found])
            label = " ".join(([run] if len(runs) > 1 else []) + ([name] if len(names) > 1 else []))
            axes.plot(at, raw, color=color, linewidth=0.8, alpha=0.3)
            line, marker = raw if is_exact else smooth(raw), "o" if len(raw) == 1 else None
            axes.plot(at, line, style, color=color, marker=marker, label=label)
            values.extend(raw[np.isfinite(raw)])
    axes.set_title(panel.replace("_", " "))
    axes.set_xlabel("steps")
    axes.grid(alpha=0.3)
    if panel == "gradient_norm" and min(values, default=0) > 0:
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
        prog="python -m duotok.recipes.training.log", description="Draw the curves of training runs as PNG"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG file (default: curves.png)")
    arguments = parser.parse_args(argv)

    def draw() -> None:
        runs = {name: read_log(path) for name, path in name_runs(arguments.runs).items()}
        draw_runs(runs, arguments.out)
        print(arguments.out)

    return guard(draw)


if __name__ == "__main__":
    sys.exit(main())
