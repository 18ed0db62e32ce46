"""One training loop for every recipe: accelerate, time or step budgets, exact resume, logs, EMA.

Every step is a pure function of (weights, optimizer, seed, step): its batches and its random numbers are
drawn from generators seeded by (seed, step, process, micro-batch), so resuming needs no loader or generator
state.
"""

import contextlib
import dataclasses
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from duotok.recipes.training.batches import MicroBatches
from duotok.recipes.training.checkpoint import TrainingState, export_component, make_folder
from duotok.recipes.training.clock import Clock
from duotok.recipes.training.deepspeed_engine import DeepSpeedState, explained_refusal, make_accelerator
from duotok.recipes.training.failures import describe_not_finite, explained_failures, stopped_by_signal
from duotok.recipes.training.log import VALIDATION, RunLog, section_of
from duotok.recipes.training.meter import Meter
from duotok.tokenizer.common.errors import ConfigError, DuoTokError
from duotok.tokenizer.common.precision import multiplies_bf16


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the loop: AdamW with warm-up and cosine decay (P C.3)."""

    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 8  # examples per process and micro-batch
    accumulate: int = 1  # micro-batches per step; its loss is the mean of theirs, as it is over processes
    learning_rate: float = 5e-4  # peak
    warmup_steps: int = 50
    final_learning_rate_ratio: float = 0.05  # of the peak, at the end of the cosine
    weight_decay: float = 0.01
    gradient_clip: float = 1.0  # global norm
    ema_decay: float = 0.0  # exponential moving average of the weights; 0 turns it off
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware multiplies it natively
    checkpoint_minutes: float = 3.0
    log_every: int = 20  # steps
    validate_every: int = 0  # steps, where the recipe has a validation; 0 turns it off
    wandb: str = ""  # project of Weights & Biases to log to as well
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"train.precision must be auto, fp32 or bf16, got {self.precision!r}")
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"train.{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "checkpoint_minutes", "validate_every"):
            if getattr(self, name) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass
class Task:
    """What a recipe trains."""

    objective: nn.Module  # forward(**batch) -> named scalar losses; "total" is minimized
    make_batch: Callable[[np.random.Generator], dict[str, Tensor]]  # pure function of the generator
    export: Callable[[Path], object]  # writes the finished component from the objective's weights
    # Named figures of the model as it is, on held-out data: "metric" or "metric/case". Runs without
    # gradients, in eval mode, with the averaged weights; on the main process, under ZeRO 3 on every one.
    validate: Callable[[], dict[str, float]] | None = None
    unit: str = "tokens"  # what count_units counts; the log's name of the speed
    count_units: Callable[[dict[str, Tensor]], int] | None = None  # of a batch
    count_flops: Callable[[dict[str, Tensor]], float] | None = None  # of a batch, forward and backward
    takes_step: bool = False  # the objective also gets "step" [], int64: the optimizer steps taken before


def run_training(
    task: Task,
    config: TrainConfig,
    out: Path,
    *,
    minutes: float | None = None,
    stop_after: int | None = None,
    deepspeed: Path | None = None,
) -> dict[str, float]:
    """Train to config.steps, or to the end of a budget of minutes, then export to out/final.

    minutes: the cosine then runs over the minutes, those of earlier pieces counted in. stop_after: leave
    with a checkpoint after that many steps of this call, as an interruption would. deepspeed: a DeepSpeed
    config file. Returns the last losses: means over the steps since the log row before.
    """
    torch.manual_seed(config.seed)
    precision = choose_precision(config.precision)
    accelerator = _start_accelerator(config, precision, deepspeed)
    parameters = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        _decay_groups(parameters, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98)
    )
    make_folder(out)
    with explained_failures(config, task.objective, None, out):
        with explained_refusal(deepspeed):
            objective, optimizer = accelerator.prepare(task.objective, optimizer)
        if deepspeed is None:
            state = TrainingState(
                parameters,
                optimizer.optimizer,
                use_ema=config.ema_decay > 0,
                processes=accelerator.num_processes,
            )
        else:
            state = DeepSpeedState(accelerator, objective)
        state.load(out / "checkpoint")
    objective.train()
    # Not accelerate's own casting: it keeps one precision for the whole life of a process, and under
    # DeepSpeed, which stores bf16 weights, it leaves it to us that floating-point inputs meet them.
    cast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16")
    clock = Clock(state.elapsed_seconds, minutes)
    limit = config.steps if minutes is None else 10**9
    stop_at = limit if stop_after is None else min(limit, state.step + stop_after)
    is_main = accelerator.is_main_process
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopped_by_signal(state, out))
        stack.enter_context(explained_failures(config, task.objective, state, out))
        meter = Meter(task, accelerator, precision)
        settings = {**dataclasses.asdict(config), "processes": accelerator.num_processes}
        log = stack.enter_context(
            RunLog(out, first_step=state.step, wandb=config.wandb, settings=settings, on=is_main)
        )
        batches = stack.enter_context(
            MicroBatches(task, config, process=accelerator.process_index, first_step=state.step)
        )
        progress = stack.enter_context(
            tqdm(
                initial=state.step,
                total=limit if minutes is None else None,
                unit="step",
                disable=None if is_main else True,
            )
        )
        last: dict[str, float] = {}
        over = _agree(accelerator, clock.is_over())
        while state.step < stop_at and not over:
            factor = learning_rate_factor(config, state.step, clock.progress(state.step, config.steps))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            _take_step(objective, optimizer, accelerator, batches, meter, config, cast)
            state.step += 1
            state.update_ema(config.ema_decay)
            progress.update()
            validates = task.validate is not None and _is_due(state.step, config.validate_every)
            logs = validates or _is_due(state.step, config.log_every) or state.step in (1, limit)
            if logs:
                _refuse_not_finite(meter, task, state, out)
                row = meter.take_row()
                last = {name: value for name, value in row.items() if section_of(name) == "loss"}
                if validates:
                    # In full precision wherever the weights are.
                    with meter.paused(), cast if deepspeed else contextlib.nullcontext():
                        row |= validate(task, objective, state, accelerator)
                place = {"step": state.step, "seconds": clock.elapsed()}
                log.write({**place, "learning_rate": config.learning_rate * factor, **row})
                progress.set_postfix({"loss": f"{last['total']:.4f}"})
            # Several processes compare their clocks at log rows only: each time costs all of them a wait.
            if logs or accelerator.num_processes == 1:
                over = _agree(accelerator, clock.is_over())
                if _agree(accelerator, clock.checkpoint_due(config.checkpoint_minutes)):
                    _refuse_not_finite(meter, task, state, out)
                    with meter.paused():
                        _save(state, clock, out, is_main)
        _refuse_not_finite(meter, task, state, out)
        _save(state, clock, out, is_main)
        if state.step >= limit or over:
            with state.export_weights():
                if is_main:
                    export_component(task.export, out / "final")
        accelerator.wait_for_everyone()
    return last


def choose_precision(precision: str) -> str:
    """Return accelerate's name of the precision: bf16 where the hardware multiplies it natively."""
    if precision == "fp32":
        return "no"
    if precision == "bf16":
        return "bf16"
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if multiplies_bf16(device) else "no"


def learning_rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, then cosine over progress 0 to 1."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    floor = config.final_learning_rate_ratio
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _take_step(
    objective: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    batches: MicroBatches,
    meter: Meter,
    config: TrainConfig,
    cast: torch.autocast,
) -> None:
    """Take one optimizer step on the mean of the losses of its micro-batches."""
    for _ in range(config.accumulate):
        batch = batches.next()
        torch.manual_seed(batch.key.torch_seed())
        with accelerator.accumulate(objective):
            with cast:
                losses = objective(**batch.to(accelerator.device))
            losses = {name: loss.float() for name, loss in losses.items()}
            accelerator.backward(losses["total"])
        meter.add(batch, losses)
    parameters = [p for p in objective.parameters() if p.requires_grad]
    meter.add_norm(accelerator.clip_grad_norm_(parameters, config.gradient_clip))
    optimizer.step()
    optimizer.zero_grad()


def validate(
    task: Task, objective: nn.Module, state: TrainingState | DeepSpeedState, accelerator: Accelerator
) -> dict[str, float]:
    """Return the task's validation figures as the log names them; the averaged weights are what is judged."""
    assert task.validate is not None
    figures: dict[str, float] = {}
    objective.eval()
    try:
        if isinstance(state, DeepSpeedState) and state.stage == 3:
            # Every process holds a share of the weights, and each layer gathers its own.
            with torch.no_grad():
                figures = task.validate()
        elif accelerator.is_main_process:
            with torch.no_grad(), state.export_weights():
                figures = task.validate()
    finally:
        objective.train()
    accelerator.wait_for_everyone()
    return {f"{VALIDATION}{name}": float(value) for name, value in figures.items()}


def _start_accelerator(config: TrainConfig, precision: str, deepspeed: Path | None) -> Accelerator:
    if deepspeed is not None:
        if config.ema_decay > 0:
            raise ConfigError("train.ema_decay must be 0 under DeepSpeed, which shards the weights")
        return make_accelerator(deepspeed, precision, config)
    # Only when told so does accelerate join processes on CPUs (started by torchrun, over gloo).
    cpus = not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    # The argument for the number of micro-batches would be overridden by the launcher's variables.
    accumulation = GradientAccumulationPlugin(num_steps=config.accumulate)
    return Accelerator(mixed_precision="no", gradient_accumulation_plugin=accumulation, cpu=cpus)


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Vectors (norms, biases) do not decay."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _agree(accelerator: Accelerator, decision: bool) -> bool:
    """Take the first process's decision everywhere: the clocks of processes differ."""
    if accelerator.num_processes == 1:
        return decision
    return bool(broadcast_object_list([decision])[0])


def _refuse_not_finite(meter: Meter, task: Task, state: TrainingState | DeepSpeedState, out: Path) -> None:
    found = meter.find_not_finite()
    if found is not None:
        raise DuoTokError(describe_not_finite(found, task, state, out))


def _save(state: TrainingState | DeepSpeedState, clock: Clock, out: Path, is_main: bool) -> None:
    state.elapsed_seconds = clock.elapsed()
    # Plain data parallelism holds the same state on every process; DeepSpeed's is sharded over all.
    if is_main or isinstance(state, DeepSpeedState):
        state.save(out / "checkpoint")
    else:
        state.saved_step = state.step
