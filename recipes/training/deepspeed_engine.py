"""Training under DeepSpeed ZeRO 0 to 3: the engine's own sharded checkpoints instead of TrainingState's."""

import contextlib
import json
import logging
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from duotok.recipes.training.checkpoint import describe_failed_save, describe_other_world
from duotok.recipes.training.deepspeed_config import read_deepspeed_config
from duotok.recipes.training.failures import is_lost_process
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.common.files import WriteError, write_json

if TYPE_CHECKING:
    from accelerate import Accelerator

    from duotok.recipes.training.loop import TrainConfig

COMMUNICATION = "deepspeed_shm_comm"  # compiled by DeepSpeed at its first start on a CPU
CPU_ADAM = "cpu_adam"  # compiled at the first start with the optimizer's state on the CPU
# What reading a damaged file of DeepSpeed raises: its checkpoints are torch's.
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)

logger = logging.getLogger(__name__)


def make_accelerator(config_file: Path, precision: str, config: "TrainConfig") -> "Accelerator":
    """Return an accelerator that trains under a DeepSpeed config file; needs the launcher's variables."""
    if "RANK" not in os.environ:
        raise ConfigError("--deepspeed needs a launcher: start with torchrun --nproc-per-node N -m ...")
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = read_deepspeed_config(config_file, config, precision=precision, processes=processes)
    check_compiler(settings, on_cpu=not torch.cuda.is_available())
    from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
    from accelerate.utils import GradientAccumulationPlugin, KwargsHandler

    # Without this, accelerate on a CPU takes every process for a world of its own.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    # Told to use the CPU by its own switch, accelerate would drop DeepSpeed without a word.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    handlers: list[KwargsHandler] = []
    if not torch.cuda.is_available():
        handlers.append(InitProcessGroupKwargs(backend="gloo"))
    return Accelerator(
        mixed_precision=precision,
        # Not its argument for the number, which the launcher's variables override.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
        deepspeed_plugin=plugin,
        kwargs_handlers=handlers,
    )


def check_compiler(settings: dict[str, Any], *, on_cpu: bool) -> None:
    """Say what DeepSpeed is about to compile; raise ConfigError where there is no compiler for it."""
    needed = [COMMUNICATION] if on_cpu and sys.platform == "linux" else []
    offload = settings["zero_optimization"].get("offload_optimizer") or {}
    if offload.get("device", "none") != "none" and settings.get("zero_force_ds_cpu_optimizer", True):
        needed.append(CPU_ADAM)
    cache = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or Path.home() / ".cache" / "torch_extensions")
    missing = [name for name in needed if not any(cache.rglob(f"{name}.so"))]
    if not missing:
        return
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        raise ConfigError(
            f"DeepSpeed compiles {' and '.join(missing)} at its first start, but there is no C++ compiler "
            f"({compiler}): install one (Debian: apt install g++), set CXX, or train without --deepspeed"
        )
    if os.environ.get("RANK", "0") == "0":
        logger.info("DeepSpeed's first start compiles %s, half a minute each ...", " and ".join(missing))


@contextlib.contextmanager
def explained_refusal(config_file: Path | None) -> Iterator[None]:
    """Turn what DeepSpeed raises at a setting it does not know or cannot combine into a ConfigError."""
    try:
        yield
    except (ValueError, AssertionError, NotImplementedError) as error:
        if config_file is None:
            raise
        reason = " ".join(str(error).split())[:300]
        raise ConfigError(f"DeepSpeed refuses the config {config_file}: {reason}") from error


class DeepSpeedState:
    """How far a run under DeepSpeed is; weights and moments live sharded in the engine."""

    def __init__(self, accelerator: "Accelerator", engine: Any) -> None:
        self.accelerator, self.engine = accelerator, engine
        self.step = 0
        self.saved_step: int | None = None  # of the checkpoint on the disk
        self.elapsed_seconds = 0.0

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.engine.zero_optimization_stage())

    def update_ema(self, decay: float) -> None:
        """DeepSpeed runs keep no average; run_training refuses a recipe that asks for one."""

    @contextlib.contextmanager
    def export_weights(self) -> Iterator[None]:
        """Gather the whole weights on every rank for the length of the block (ZeRO 3 shards them)."""
        import deepspeed

        # Frozen ones too: ZeRO 3 shards everything.
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            yield

    def save(self, folder: Path) -> None:
        """Write every rank's shard, then the step; a checkpoint without the step does not count.

        Raises CheckpointError when it cannot be written, on a full disk for instance; the old one stays.
        """
        if self.step == self.saved_step:
            return  # writing over the only good one would put it at risk
        name = f"step-{self.step}"
        try:
            self.engine.save_checkpoint(str(folder), tag=name)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(folder / name, ignore_errors=True)
            if is_lost_process(error):
                raise
            raise CheckpointError(describe_failed_save(folder, self.step, self.saved_step, error)) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                self._write_progress(folder)
            except WriteError as error:
                told = describe_failed_save(folder, self.step, self.saved_step, error)
                raise CheckpointError(told) from error
            self.saved_step = self.step
            for old in folder.glob("step-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step

    def _write_progress(self, folder: Path) -> None:
        progress = {
            "step": self.step,
            "elapsed_seconds": self.elapsed_seconds,
            "processes": self.accelerator.num_processes,
            "zero_stage": self.stage,
        }
        write_json(folder / "state.json", progress)

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; say whether there was."""
        if not (folder / "state.json").exists():
            return False
        if (folder / "optimizer.safetensors").exists():
            raise CheckpointError(f"{folder} was written without DeepSpeed; leave --deepspeed away")
        try:
            progress = json.loads((folder / "state.json").read_text(encoding="utf-8"))
            step, elapsed_seconds = int(progress["step"]), float(progress["elapsed_seconds"])
            written = {"processes": int(progress["processes"]), "zero_stage": int(progress["zero_stage"])}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder / 'state.json'} is damaged; delete {folder}") from error
        if written["processes"] != self.accelerator.num_processes:
            running = self.accelerator.num_processes
            raise CheckpointError(describe_other_world(folder, written["processes"], running))
        if written["zero_stage"] != self.stage:
            raise CheckpointError(
                f"the checkpoint {folder} is of ZeRO {written['zero_stage']}, this run of ZeRO {self.stage}; "
                "give the DeepSpeed config it was started with"
            )
        try:
            found, _ = self.engine.load_checkpoint(str(folder), tag=f"step-{step}")
        except DAMAGED as error:
            if is_lost_process(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint {folder / f'step-{step}'} is damaged or of another recipe ({reason}); "
                f"delete {folder} to start again"
            ) from error
        if found is None:
            raise CheckpointError(f"{folder / f'step-{step}'} is missing; delete {folder} to start again")
        self.step, self.saved_step, self.elapsed_seconds = step, step, elapsed_seconds
        return True
