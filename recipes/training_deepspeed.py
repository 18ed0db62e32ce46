"""Training under DeepSpeed ZeRO 1 to 3: the engine's own sharded checkpoints instead of TrainingState's."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from duotok.tokenizer.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from accelerate import Accelerator


def make_accelerator(config_file: Path, precision: str, gradient_clip: float) -> "Accelerator":
    """Return an accelerator that trains under a DeepSpeed config file; needs the launcher's variables."""
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs

    if "RANK" not in os.environ:
        raise ConfigError("--deepspeed needs a launcher: start with torchrun --nproc-per-node N -m ...")
    try:
        settings = json.loads(config_file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {config_file}: {error}") from error
    settings["gradient_clipping"] = gradient_clip
    # Without this, accelerate on a CPU takes every process for a world of its own.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    # Told to use the CPU by its own switch, accelerate would drop DeepSpeed without a word.
    handlers = [] if torch.cuda.is_available() else [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(mixed_precision=precision, deepspeed_plugin=plugin, kwargs_handlers=handlers)


class DeepSpeedState:
    """How far a run under DeepSpeed is; weights and moments live sharded in the engine."""

    def __init__(self, accelerator: "Accelerator", parameters: dict[str, nn.Parameter]) -> None:
        self.accelerator, self.parameters = accelerator, parameters
        self.step = 0
        self.elapsed_seconds = 0.0

    def update_ema(self, decay: float) -> None:
        """DeepSpeed runs keep no average; run_training refuses a recipe that asks for one."""

    @contextlib.contextmanager
    def export_weights(self) -> Iterator[None]:
        """Gather the whole weights on every rank for the length of the block (ZeRO 3 shards them)."""
        import deepspeed

        with deepspeed.zero.GatheredParameters(list(self.parameters.values())):
            yield

    def save(self, folder: Path) -> None:
        """Write every rank's shard, then the step; a checkpoint without the step does not count."""
        self.accelerator.save_state(str(folder / f"step-{self.step}"))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            progress = {
                "step": self.step,
                "elapsed_seconds": self.elapsed_seconds,
                "processes": self.accelerator.num_processes,
            }
            temporary = folder / "state.json.part"
            temporary.write_text(json.dumps(progress), encoding="utf-8")
            temporary.replace(folder / "state.json")
        self.accelerator.wait_for_everyone()

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; say whether there was."""
        if not (folder / "state.json").exists():
            return False
        try:
            progress = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step, processes = int(progress["step"]), int(progress["processes"])
        except (OSError, ValueError, KeyError) as error:
            raise CheckpointError(f"{folder / 'state.json'} is damaged; delete {folder}") from error
        if processes != self.accelerator.num_processes:
            raise CheckpointError(
                f"the checkpoint {folder} is of {processes} processes, this run has "
                f"{self.accelerator.num_processes}; start with as many"
            )
        self.accelerator.load_state(str(folder / f"step-{step}"))
        self.step, self.elapsed_seconds = step, float(progress["elapsed_seconds"])
        return True
