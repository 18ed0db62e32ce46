"""Where figures of a run go: log.jsonl, TensorBoard where installed, Weights & Biases where asked for."""

import json
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from duotok.tokenizer.common.errors import ConfigError, DuoTokError

FILE_NAME = "log.jsonl"
PLACE = ("step", "seconds")  # where in the run a row belongs
OPTIMIZER = ("learning_rate", "gradient_norm")
SPEED = ("mfu", "peak_memory_gb")
VALIDATION = "validation/"
_DIGITS = {"seconds": 2, "learning_rate": 12}


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
        if on:
            _drop_half_line(self._path)
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
        tagged = {_tag(name): value for name, value in row.items() if name not in PLACE}
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


def _tag(name: str) -> str:
    return name if name.startswith(VALIDATION) else f"{section_of(name)}/{name}"


def read_log(folder: Path) -> list[dict[str, float]]:
    """Return the rows of a run; those that a resumed run took again replace the earlier ones."""
    path = folder / FILE_NAME if folder.is_dir() else folder
    rows: list[dict[str, float]] = []
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


def _drop_half_line(path: Path) -> None:
    """Take away what a killed run or a full disk left of a row."""
    if path.exists():
        content = path.read_bytes()
        if not content.endswith(b"\n"):
            path.write_bytes(content[: content.rfind(b"\n") + 1])


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
