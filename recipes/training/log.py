"""The log of a run: rows to log.jsonl, TensorBoard or a tracker, read back, and drawn as curves.

Run: python -m duotok.recipes.training.log runs/small/lm [runs/small/lm2 ...] --out curves.png
The PNG has one panel per kind of figure; thick lines are smoothed, what was logged is behind them.
"""

import argparse
import contextlib
import itertools
import json
import secrets
import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from scipy.signal import lfilter

from duotok.recipes.training.task import TRACKERS
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

Rows = list[dict[str, float]]

FILE_NAME = "log.jsonl"
PLACE = ("step", "seconds")  # where in the run a row belongs
OPTIMIZER = ("learning_rate", "gradient_norm")
SPEED = ("mfu", "peak_memory_gb")
VALIDATION = "validation/"
_DIGITS = {"seconds": 2, "learning_rate": 12}
SECTIONS = ("loss", "validation", "optimizer", "speed")  # the order of the panels
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

    def __init__(
        self, out: Path, *, first_step: int, log_to: str, settings: dict[str, Any], on: bool
    ) -> None:
        """first_step: steps already taken; log_to: see TrainConfig; settings: shown by a tracker."""
        self._path = out / FILE_NAME
        self._on = on
        self._board: Any = None
        self._tracker: Any = None
        kind, _, project = log_to.partition(":")
        if kind in TRACKERS and find_spec(kind) is None:
            raise ConfigError(f"the run is to log to {kind}, but {kind} is missing: pip install {kind}")
        if on and self._path.exists():  # what a killed run or a full disk left of a row goes
            content = self._path.read_bytes()
            self._path.write_bytes(content[: content.rfind(b"\n") + 1])
        if on and kind == "tensorboard" and find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            # Rows that a killed run wrote after its last checkpoint are taken back.
            self._board = SummaryWriter(str(out / "tensorboard"), purge_step=first_step + 1)
        if on and kind in TRACKERS:
            self._tracker = _start_tracker(kind, out, project or "duotok", settings)

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._board is not None:
            self._board.close()
        if self._tracker is not None:
            with contextlib.redirect_stdout(sys.stderr):
                self._tracker.finish()

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
        if self._tracker is not None:
            self._tracker.log(tagged, step=step)


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


def _start_tracker(kind: str, out: Path, project: str, settings: dict[str, Any]) -> Any:
    """Open the run in a project of the tracker, where a resumed run goes on; return its module."""
    tracker = import_module(kind)
    name_file = out / f"{kind}_run.txt"
    if not name_file.exists():
        name_file.write_text(secrets.token_hex(4), encoding="utf-8")
    run, name = name_file.read_text(encoding="utf-8").strip(), out.resolve().name
    if kind == "wandb":
        place, failures = {"dir": str(out), "name": name, "id": run}, (tracker.errors.Error, OSError)
    else:
        place, failures = {"name": f"{name}-{run}", "embed": False}, (OSError, ValueError, RuntimeError)
    try:
        with contextlib.redirect_stdout(sys.stderr):
            tracker.init(project=project, resume="allow", config=settings, **place)
    except failures as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"{kind} does not start: {reason}; leave --log-to away") from error
    return tracker


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
    """Draw runs by name into a PNG file; return the panels' names, the total loss first."""
    from matplotlib.figure import Figure

    names = {name for rows in runs.values() for row in rows for name in row if name not in PLACE}
    names = sorted(names, key=lambda name: (SECTIONS.index(section_of(name)), panel_of(name), name))
    panels: dict[str, list[str]] = {"total": []}
    for name in names:
        panels.setdefault(panel_of(name), []).append(name)
    lines = -(-len(panels) // COLUMNS)
    figure = Figure(figsize=(5.2 * COLUMNS, 3.4 * lines + 0.4), layout="constrained")
    for number, (panel, shown) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(lines, COLUMNS, number, title=panel.replace("_", " "), xlabel="steps")
        for (run, rows), style in zip(runs.items(), itertools.cycle(LINE_STYLES), strict=False):
            for place, name in enumerate(shown):
                found = [row for row in rows if name in row]
                at, raw = [row["step"] for row in found], np.array([row[name] for row in found])
                is_exact = panel in EXACT or section_of(name) == "validation" or not found
                label, color = f"{run} {name}", f"C{place % 10}"
                axes.plot(at, raw, color=color, linewidth=0.8, alpha=0.3)
                axes.plot(at, raw if is_exact else smooth(raw), style, color=color, label=label)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, framealpha=0.6)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except (OSError, ValueError) as error:
        raise DuoTokError(f"cannot write {path}: {error}; give another --out, ending in .png") from error
    return list(panels)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.training.log", description="Draw the curves of training runs as PNG"
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", type=Path, default=Path("curves.png"), help="PNG file (default: curves.png)")
    arguments = parser.parse_args(argv)

    def draw() -> None:
        draw_runs({str(path): read_log(path) for path in arguments.runs}, arguments.out)
        print(arguments.out)

    return guard(draw)


if __name__ == "__main__":
    sys.exit(main())
