"""Training under DeepSpeed ZeRO 0 to 3: its config file, completed by the recipe; its sharded checkpoints."""

import contextlib
import importlib
import json
import logging
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, KwargsHandler

from duotok.recipes.training.failures import is_lost_process
from duotok.recipes.training.run_state import RunState, damaged_checkpoint
from duotok.recipes.training.task import TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.common.files import WriteError, write_json

STAGES = (0, 1, 2, 3)
# What the loop does itself; the file may not bring its own.
OURS = {"optimizer": "the recipe's AdamW", "scheduler": "the recipe's warm-up and cosine"}
OTHER_PRECISIONS = ("fp16", "amp", "torch_autocast", "fp8")
COMMUNICATION = "deepspeed_shm_comm"  # compiled by DeepSpeed at its first start on a CPU
CPU_ADAM = "cpu_adam"  # compiled at the first start with the optimizer's state on the CPU
# What reading a damaged file of DeepSpeed raises: its checkpoints are torch's.
DAMAGED = (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError, zipfile.BadZipFile)

logger = logging.getLogger(__name__)


def read_deepspeed_config(
    path: Path, config: TrainConfig, *, precision: str, processes: int
) -> dict[str, Any]:
    """Return a file's settings, completed from the recipe; one ConfigError names every contradiction."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"cannot read the DeepSpeed config {path}: {error}") from error
    if not isinstance(settings, dict) or not isinstance(settings.get("zero_optimization"), dict):
        raise ConfigError(f"the DeepSpeed config {path} needs a section zero_optimization with a stage")
    stage = settings["zero_optimization"].get("stage")
    if stage not in STAGES:
        raise ConfigError(f"{path}: zero_optimization.stage must be 0, 1, 2 or 3, got {stage!r}")
    contradictions = [
        *_fill(settings, config, processes),
        *_fill_precision(settings, "bf16" if precision == "bf16" else "fp32"),
        *(f"remove {name}: training uses {ours}" for name, ours in OURS.items() if name in settings),
    ]
    if contradictions:
        raise ConfigError(f"the DeepSpeed config {path} contradicts the recipe: {'; '.join(contradictions)}")
    return settings


def _fill(settings: dict[str, Any], config: TrainConfig, processes: int) -> list[str]:
    recipe = {
        "train_micro_batch_size_per_gpu": ("train.batch_size", config.batch_size),
        "gradient_accumulation_steps": ("train.accumulate", config.accumulate),
        "gradient_clipping": ("train.gradient_clip", config.gradient_clip),
        "train_batch_size": (
            "train.batch_size x train.accumulate x processes",
            processes * config.batch_size * config.accumulate,
        ),
    }
    contradictions = []
    for key, (name, value) in recipe.items():
        if settings.get(key, "auto") not in ("auto", value):
            contradictions.append(f'{key} is {settings[key]!r}, {name} is {value} (write "auto")')
        settings[key] = value
    return contradictions


def _fill_precision(settings: dict[str, Any], precision: str) -> list[str]:
    contradictions = [
        f"{name} is on, train.precision is {precision}"
        for name in OTHER_PRECISIONS
        if _is_on(settings.get(name), precision="")
    ]
    wanted = precision == "bf16"
    if _is_on(settings.get("bf16", {"enabled": "auto"}), precision=precision) != wanted:
        told = settings["bf16"].get("enabled", False)
        contradictions.append(f'bf16.enabled is {told}, train.precision is {precision} (write "auto")')
    settings["bf16"] = {**settings.get("bf16", {}), "enabled": wanted}
    return contradictions


def _is_on(section: dict[str, Any] | None, *, precision: str) -> bool:
    enabled = (section or {}).get("enabled", False)
    return precision == "bf16" if enabled == "auto" else bool(enabled)


def make_accelerator(config_file: Path, precision: str, config: TrainConfig) -> Accelerator:
    """Return an accelerator that trains under a DeepSpeed config file; needs the launcher's variables."""
    if "RANK" not in os.environ:
        raise ConfigError("--deepspeed needs a launcher: start with torchrun --nproc-per-node N -m ...")
    importlib.import_module("deepspeed")  # accelerate's own words would not say how to get it
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    settings = read_deepspeed_config(config_file, config, precision=precision, processes=processes)
    check_compiler(settings, on_cpu=not torch.cuda.is_available())
    # Without this, accelerate on a CPU takes every process for a world of its own.
    os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
    plugin = DeepSpeedPlugin(hf_ds_config=settings)
    # Told to use the CPU by its own switch, accelerate would drop DeepSpeed without a word.
    os.environ.pop("ACCELERATE_USE_CPU", None)
    gloo: list[KwargsHandler] = [InitProcessGroupKwargs(backend="gloo")]
    return Accelerator(
        mixed_precision=precision,
        # Not its argument for the number, which the launcher's variables override.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=config.accumulate),
        deepspeed_plugin=plugin,
        kwargs_handlers=[] if torch.cuda.is_available() else gloo,
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


class DeepSpeedState(RunState):
    """How far a run under DeepSpeed is; weights, buffers and moments live sharded in the engine."""

    def __init__(self, accelerator: Accelerator, engine: Any) -> None:
        super().__init__(accelerator.num_processes)
        self.accelerator, self.engine = accelerator, engine

    @property
    def stage(self) -> int:
        """The ZeRO stage."""
        return int(self.engine.zero_optimization_stage())

    @contextlib.contextmanager
    def export_weights(self) -> Iterator[None]:
        """Gather the whole weights on every rank for the length of the block (ZeRO 3 shards them)."""
        deepspeed = importlib.import_module("deepspeed")
        # Frozen ones too: ZeRO 3 shards everything.
        with deepspeed.zero.GatheredParameters(list(self.engine.module.parameters())):
            yield

    def save(self, folder: Path) -> None:
        """Write every rank's shard, then the step; a checkpoint without the step does not count."""
        if self.step == self.saved_step:
            return  # writing over the only good one would put it at risk
        name = f"step-{self.step}"
        try:
            self.engine.save_checkpoint(str(folder), tag=name)
        except (OSError, RuntimeError) as error:  # torch reports a full disk as RuntimeError
            shutil.rmtree(folder / name, ignore_errors=True)
            if is_lost_process(error):
                raise
            raise self.failed_save(self.step, folder, error) from error
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            try:
                write_json(folder / "state.json", {**self.progress(), "zero_stage": self.stage})
            except WriteError as error:
                raise self.failed_save(self.step, folder, error) from error
            self.saved_step = self.step
            for old in folder.glob("step-*"):
                if old.name != name:
                    shutil.rmtree(old, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self.saved_step = self.step

    def load(self, folder: Path) -> bool:
        """Take up a checkpoint if there is one; say whether there was."""
        if not (folder / "state.json").exists():
            return False
        if (folder / "optimizer.safetensors").exists():
            raise CheckpointError(f"{folder} was written without DeepSpeed; leave --deepspeed away")
        stage = self.take_up_progress(folder).get("zero_stage")
        if not isinstance(stage, int):
            raise damaged_checkpoint(folder)
        if stage != self.stage:
            raise CheckpointError(
                f"the checkpoint {folder} is of ZeRO {stage}, this run of ZeRO {self.stage}; give the "
                "DeepSpeed config it was started with"
            )
        shards = folder / f"step-{self.step}"
        try:
            found, _ = self.engine.load_checkpoint(str(folder), tag=shards.name)
        except DAMAGED as error:
            if is_lost_process(error):
                raise
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise CheckpointError(
                f"the checkpoint {shards} is damaged or of another recipe ({reason}); delete {folder} to "
                "start again"
            ) from error
        if found is None:
            raise CheckpointError(f"{shards} is missing; delete {folder} to start again")
        return True
