"""Checkpoints of a run: weights, moving average and AdamW's moments as safetensors, the rest as JSON."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.common.files import WriteError, failure_reason, whole_folder, write_json, write_tensors


class TrainingState:
    """The trained parameters, their optimizer moments and moving average, and how far the run is."""

    def __init__(
        self,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        use_ema: bool,
        processes: int = 1,
    ) -> None:
        """processes: of the run; each adds its own batches to a step."""
        self.processes = processes
        self.parameters = parameters
        self.optimizer = optimizer
        self.ema = {name: p.detach().clone() for name, p in parameters.items()} if use_ema else {}
        self.step = 0
        self.saved_step: int | None = None  # of the checkpoint on the disk
        self.elapsed_seconds = 0.0

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Move the average towards the weights; the early steps use a shorter memory."""
        if not self.ema:
            return
        decay = min(decay, (1 + self.step) / (10 + self.step))
        names = list(self.ema)
        torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
            [self.ema[n] for n in names], [self.parameters[n].detach() for n in names], 1 - decay
        )

    @contextlib.contextmanager
    def export_weights(self) -> Iterator[None]:
        """Put the averaged weights, if any, in the model for the length of the block."""
        saved = {name: self.parameters[name].detach().clone() for name in self.ema}
        _copy(self.ema, self.parameters)
        try:
            yield
        finally:
            _copy(saved, self.parameters)

    def save(self, folder: Path) -> None:
        """Write a checkpoint folder; the old one is replaced only by a whole new one.

        Raises CheckpointError when it cannot be written, on a full disk for instance; the old one stays.
        """
        try:
            with whole_folder(folder) as temporary:
                self._write(temporary)
        except WriteError as error:
            raise CheckpointError(describe_failed_save(folder, self.step, self.saved_step, error)) from error
        self.saved_step = self.step

    def _write(self, temporary: Path) -> None:
        write_tensors(temporary / "weights.safetensors", self.parameters)
        if self.ema:
            write_tensors(temporary / "ema.safetensors", self.ema)
        moments: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                moments[f"{name}:{key}"] = value
        write_tensors(temporary / "optimizer.safetensors", moments)
        progress = {
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
            "processes": self.processes,
        }
        write_json(temporary / "state.json", progress)

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; say whether there was."""
        _restore_replaced(folder)
        if not folder.exists():
            return False
        if any(folder.glob("step-*")):
            raise CheckpointError(f"{folder} was written under DeepSpeed; give --deepspeed again")
        try:
            weights = load_file(folder / "weights.safetensors")
            moments = load_file(folder / "optimizer.safetensors")
            ema = load_file(folder / "ema.safetensors") if self.ema else {}
            progress = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step, elapsed_seconds = int(progress["step"]), float(progress["elapsed_seconds"])
            # Not in checkpoints that were written before several processes were counted.
            processes = int(progress.get("processes", self.processes))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"the checkpoint {folder} is damaged; delete it to start again") from error
        if processes != self.processes:
            raise CheckpointError(describe_other_world(folder, processes, self.processes))
        if set(weights) != set(self.parameters):
            raise CheckpointError(f"the checkpoint {folder} is of another recipe; give another --out folder")
        _copy(weights, self.parameters)
        _copy(ema, self.ema)
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            parameter = self.parameters[name]
            # AdamW keeps its step counter on the CPU, its moments with the parameter.
            value = value if moment == "step" else value.to(parameter.device)
            self.optimizer.state[parameter][moment] = value
        self.step = self.saved_step = step
        self.elapsed_seconds = elapsed_seconds
        return True


def make_folder(folder: Path) -> None:
    """Make the folder of a run."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"cannot make the folder {folder}: {error.strerror or error}") from error


def export_component(export: Callable[[Path], object], folder: Path) -> None:
    """Write the finished component; raise CheckpointError where it cannot be written."""
    try:
        export(folder)
    except (OSError, WriteError) as error:
        raise CheckpointError(
            f"cannot write {folder} ({failure_reason(error)}); the last checkpoint is whole: free some "
            "space, then run the same command again"
        ) from error


def describe_failed_save(folder: Path, step: int, saved_step: int | None, error: Exception) -> str:
    """Return one line about a checkpoint that could not be written."""
    left = "there is no earlier one" if saved_step is None else f"the one of step {saved_step} stays"
    return (
        f"cannot write the checkpoint of step {step} to {folder} ({failure_reason(error)}); {left}; free "
        "some space, then run the same command again to go on"
    )


def describe_other_world(folder: Path, written: int, running: int) -> str:
    """Return one line about a checkpoint of another number of processes: its steps were of other batches."""
    return (
        f"the checkpoint {folder} is of {written} processes, this run has {running}; start with as many, or "
        "give another --out to start anew"
    )


def _restore_replaced(folder: Path) -> None:
    """Put back a checkpoint that was being replaced at the moment the run was killed."""
    replaced = sorted(folder.parent.glob(f".{folder.name}.*.old"))
    if replaced and not folder.exists():
        replaced[-1].replace(folder)


@torch.no_grad()
def _copy(source: dict[str, Tensor], target: dict[str, Tensor] | dict[str, nn.Parameter]) -> None:
    for name, tensor in source.items():
        if target[name].shape != tensor.shape:
            raise CheckpointError(
                f"{name} has shape {tuple(tensor.shape)}, expected {tuple(target[name].shape)}"
            )
        target[name].copy_(tensor)
