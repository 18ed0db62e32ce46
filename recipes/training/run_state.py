"""Checkpoints and resume: weights, buffers, average and AdamW's moments as safetensors, the rest as JSON."""

import contextlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.common.files import WriteError, failure_reason, whole_folder, write_json, write_tensors


class RunState(ABC):
    """How far a run is, and how it is written to its checkpoint folder and taken up from there."""

    def __init__(self, processes: int) -> None:
        """processes: of the run; each adds its own batches to a step."""
        self.processes = processes
        self.step = 0
        self.saved_step: int | None = None  # of the checkpoint on the disk
        self.elapsed_seconds = 0.0

    def update_ema(self, decay: float) -> None:  # noqa: B027
        """Move the average, where the run keeps one, towards the weights."""

    @abstractmethod
    def export_weights(self) -> contextlib.AbstractContextManager[None]:
        """Put the weights that are judged and exported in the model for the length of the block."""

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write a checkpoint folder, or begin to; where that fails CheckpointError, and the old one stays."""

    def finish(self) -> None:  # noqa: B027
        """Wait for the checkpoint that is being written; raise CheckpointError where it could not be."""

    def settle(self) -> None:  # noqa: B027
        """Wait for the checkpoint that is being written, whatever becomes of it."""

    @abstractmethod
    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; say whether there was."""

    def progress(self) -> dict[str, Any]:
        """Return how far the run is."""
        return {"step": self.step, "elapsed_seconds": self.elapsed_seconds, "processes": self.processes}

    def take_up_progress(self, folder: Path) -> dict[str, Any]:
        """Read state.json of a checkpoint: the run is as far as it was. Return all that it holds."""
        try:
            progress = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step, elapsed_seconds = int(progress["step"]), float(progress["elapsed_seconds"])
            processes = int(progress["processes"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise damaged_checkpoint(folder) from error
        if processes != self.processes:  # its steps were of other batches
            raise CheckpointError(
                f"the checkpoint {folder} is of {processes} processes, this run has {self.processes}; start "
                "with as many, or give another --out to start anew"
            )
        self.step = self.saved_step = step
        self.elapsed_seconds = elapsed_seconds
        return progress

    def failed_save(self, step: int, folder: Path, error: Exception) -> CheckpointError:
        """Return the error, in one line, of a checkpoint that could not be written."""
        stays = f"the one of step {self.saved_step} stays"
        return CheckpointError(
            f"cannot write the checkpoint of step {step} to {folder} ({failure_reason(error)}); "
            f"{'there is no earlier one' if self.saved_step is None else stays}; free some space, then run "
            "the same command again to go on"
        )


class TrainingState(RunState):
    """The objective's parameters and persistent buffers, trained or not, AdamW's moments, the average."""

    def __init__(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer, *, use_ema: bool, processes: int = 1
    ) -> None:
        super().__init__(processes)
        self.parameters = {name: p for name, p in objective.named_parameters() if p.requires_grad}
        persistent = set(objective.state_dict(keep_vars=True))
        everything = [*objective.named_parameters(), *objective.named_buffers()]
        self.tensors = {name: tensor for name, tensor in everything if name in persistent}
        self.optimizer = optimizer
        self.ema = {name: p.detach().clone() for name, p in self.parameters.items()} if use_ema else {}
        self._writer = ThreadPoolExecutor(1)
        self._writing: Future[None] | None = None

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
        """Begin to write a checkpoint folder from copies, while training goes on.

        The old one is replaced only by a whole new one. Waits for the one before, whose failure it raises.
        """
        self.finish()
        moments = {
            f"{name}:{key}": value
            for name, parameter in self.parameters.items()
            for key, value in self.optimizer.state.get(parameter, {}).items()
        }
        files = {"weights": self.tensors, "optimizer": moments} | ({"ema": self.ema} if self.ema else {})
        copies = {
            name: {key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors.items()}
            for name, tensors in files.items()
        }
        self._writing = self._writer.submit(self._write, folder, copies, self.progress())

    def finish(self) -> None:
        """Wait for the checkpoint that is being written; raise CheckpointError where it could not be."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, whatever becomes of it."""
        if self._writing is not None:
            wait([self._writing])

    def _write(self, folder: Path, files: dict[str, dict[str, Tensor]], progress: dict[str, Any]) -> None:
        try:
            with whole_folder(folder) as temporary:
                for name, tensors in files.items():
                    write_tensors(temporary / f"{name}.safetensors", tensors)
                write_json(temporary / "state.json", progress)
        except WriteError as error:
            raise self.failed_save(progress["step"], folder, error) from error
        self.saved_step = progress["step"]

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; an average that it has not starts from its weights."""
        replaced = sorted(folder.parent.glob(f".{folder.name}.*.old"))
        if replaced and not folder.exists():  # killed while the checkpoint was being replaced
            replaced[-1].replace(folder)
        for half in folder.parent.glob(f".{folder.name}.*.part"):  # killed while it was being written
            shutil.rmtree(half, ignore_errors=True)
        if not folder.exists():
            return False
        if any(folder.glob("step-*")):
            raise CheckpointError(f"{folder} was written under DeepSpeed; give --deepspeed again")
        self.take_up_progress(folder)
        try:
            weights = load_file(folder / "weights.safetensors")
            moments = load_file(folder / "optimizer.safetensors")
            has_ema = (folder / "ema.safetensors").exists()
            ema = load_file(folder / "ema.safetensors") if self.ema and has_ema else weights
        except (OSError, SafetensorError) as error:
            raise damaged_checkpoint(folder) from error
        shapes = {name: tensor.shape for name, tensor in weights.items()}
        trained = {key.rpartition(":")[0] for key in moments}
        if shapes != {n: t.shape for n, t in self.tensors.items()} or not trained <= set(self.parameters):
            raise CheckpointError(f"the checkpoint {folder} is of another recipe; give another --out folder")
        _copy(weights, self.tensors)
        _copy({name: ema[name] for name in self.ema}, self.ema)
        for key, value in moments.items():
            name, _, moment = key.rpartition(":")
            parameter = self.parameters[name]
            # Fused, AdamW keeps its step counter with the parameter too.
            self.optimizer.state[parameter][moment] = value.to(parameter.device)
        return True


def damaged_checkpoint(folder: Path) -> CheckpointError:
    """Return the error of a checkpoint that cannot be read."""
    return CheckpointError(f"the checkpoint {folder} is damaged; delete it to start again")


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


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, tensor in source.items():
        target[name].copy_(tensor)
