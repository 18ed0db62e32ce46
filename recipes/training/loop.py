"""One training loop for every recipe: accelerate, time or step budgets, exact resume, logs, EMA.

Every step is a pure function of (weights, optimizer, seed, step): its batches and random numbers are drawn by
(seed, step, process, micro-batch), so resuming needs no loader or generator state.
"""

import contextlib
import dataclasses
import functools
import importlib.util
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import GradientAccumulationPlugin, broadcast_object_list, gather_object
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from duotok.recipes.training.batches import MicroBatch, open_batches
from duotok.recipes.training.deepspeed_engine import DeepSpeedState, explained_refusal, make_accelerator
from duotok.recipes.training.failures import explained_failures, refuse_not_finite, stopped_by_signal
from duotok.recipes.training.log import VALIDATION, RunLog, section_of
from duotok.recipes.training.meter import Meter
from duotok.recipes.training.run_state import RunState, TrainingState, export_component, make_folder
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.precision import multiplies_bf16

CLOCK_STEPS = 10  # after so many, processes that train for minutes compare their clocks

ValueT = TypeVar("ValueT")


class Clock:
    """Counts on from earlier seconds, by the first process's clock, or all learning rates would part."""

    def __init__(self, before_seconds: float, minutes: float | None, accelerator: Accelerator) -> None:
        self._start = time.monotonic() - before_seconds
        self._budget_seconds = None if minutes is None else minutes * 60
        self._last_checkpoint = time.monotonic()
        self._accelerator = accelerator
        self._agreed: float | None = None

    def elapsed(self) -> float:
        """Return the seconds of the whole run."""
        return time.monotonic() - self._start

    def progress(self, step: int, steps: int) -> float:
        """Return how much of the run is done, 0 to 1: of the budget, or of the steps where there is none."""
        if self._budget_seconds is None:
            return step / steps
        # Each agreement is a wait for all processes: in between their progress stands still.
        alone = self._accelerator.num_processes == 1
        if alone or self._agreed is None or step % CLOCK_STEPS == 0:
            self._agreed = self._agree(self.elapsed() / self._budget_seconds)
        return min(1.0, self._agreed)

    def checkpoint_due(self, minutes: float) -> bool:
        """Say whether the last checkpoint is that old, and count from now if so."""
        is_due = self._agree(time.monotonic() - self._last_checkpoint >= minutes * 60)
        if is_due:
            self._last_checkpoint = time.monotonic()
        return is_due

    def _agree(self, value: ValueT) -> ValueT:
        """Return the first process's value."""
        return value if self._accelerator.num_processes == 1 else broadcast_object_list([value])[0]


def train_recipe(build: Callable[[Any], Task], config: Any, out: Path, **options: Any) -> dict[str, float]:
    """Build a recipe's task, from the seed, so that new layers are the same each time, and run it."""
    torch.manual_seed(config.train.seed)
    return run_training(build(config), config.train, out, **options)


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

    The cosine runs over the minutes, those of earlier pieces counted in. stop_after: leave with a checkpoint
    after that many steps of this call. deepspeed: its config file. Returns the last log row's losses.
    """
    if minutes is not None and not minutes > 0:
        raise ConfigError(f"--minutes must be above 0, got {minutes}")
    torch.manual_seed(config.seed)
    precision = choose_precision(config.precision)
    accelerator = _start_accelerator(config, precision, deepspeed)
    parameters = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
    # Fused: on a CPU as well the fastest, four times as fast as one operator after the other.
    groups = _decay_groups(parameters, config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.98), fused=True)
    make_folder(out)
    with explained_failures(config, task.objective, None, out):
        with explained_refusal(deepspeed):
            objective, optimizer = accelerator.prepare(task.objective, optimizer)
        state: RunState
        if deepspeed is None:
            use_ema, processes = config.ema_decay > 0, accelerator.num_processes
            state = TrainingState(task.objective, optimizer.optimizer, use_ema=use_ema, processes=processes)
        else:
            state = DeepSpeedState(accelerator, objective)
        state.load(out / "checkpoint")
    objective.train()
    # Not accelerate's own casting: it keeps one precision for the whole life of a process, and under
    # DeepSpeed, which stores bf16 weights, it leaves it to us that floating-point inputs meet them.
    cast = torch.autocast(accelerator.device.type, torch.bfloat16, enabled=precision == "bf16")
    clock = Clock(state.elapsed_seconds, minutes, accelerator)
    limit = config.steps if minutes is None else 10**9
    stop_at = limit if stop_after is None else min(limit, state.step + stop_after)
    is_main, alone = accelerator.is_main_process, accelerator.num_processes == 1
    with contextlib.ExitStack() as stack:
        stack.callback(state.settle)  # whatever ends the run, a checkpoint that is begun becomes whole
        stack.enter_context(prepared_blocks(task.objective, config))
        stack.enter_context(stopped_by_signal(state, out))
        stack.enter_context(explained_failures(config, task.objective, state, out))
        meter = Meter(task, accelerator, precision)

        def save() -> None:
            refuse_not_finite(meter.find_not_finite(), task, state, out)
            state.elapsed_seconds = clock.elapsed()
            # Plain data parallelism holds the same state on every process; DeepSpeed's is sharded over all.
            if is_main or deepspeed is not None:
                state.save(out / "checkpoint")
            else:
                state.saved_step = state.step

        settings = {**dataclasses.asdict(config), "processes": accelerator.num_processes}
        enter, step, device = stack.enter_context, state.step, accelerator.device
        log = enter(RunLog(out, first_step=step, log_to=config.log_to, settings=settings, on=is_main))
        process = accelerator.process_index
        batches = enter(open_batches(task, config, process=process, first_step=step, device=device))
        total = limit if minutes is None else None
        progress = enter(tqdm(initial=step, total=total, unit="step", disable=None if is_main else True))
        last: dict[str, float] = {}
        while (done := clock.progress(state.step, limit)) < 1 and state.step < stop_at:
            learning_rate = config.learning_rate * learning_rate_factor(config, state.step, done)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            _take_step(objective, optimizer, accelerator, batches, meter, config, cast)
            state.step += 1
            state.update_ema(config.ema_decay)
            progress.update()
            every = config.validate_every if task.validate is not None else 0
            validates = every > 0 and state.step % every == 0
            logs = validates or state.step % config.log_every == 0 or state.step in (1, limit)
            if logs:
                refuse_not_finite(meter.find_not_finite(), task, state, out)
                row = meter.take_row()
                last = {name: value for name, value in row.items() if section_of(name) == "loss"}
                if validates:
                    # In full precision wherever the weights are.
                    with meter.paused(), cast if deepspeed else contextlib.nullcontext():
                        row |= validate(task, objective, state, accelerator)
                place = {"step": state.step, "seconds": clock.elapsed()}
                log.write({**place, "learning_rate": learning_rate, **row})
                progress.set_postfix({"loss": f"{last['total']:.4f}"})
            # Several processes compare their clocks at log rows only: each time costs all of them a wait.
            if (logs or alone) and clock.checkpoint_due(config.checkpoint_minutes):
                with meter.paused():
                    save()
        save()
        state.finish()
        if done >= 1:
            with state.export_weights():
                if is_main:
                    export_component(task.export, out / "final")
        accelerator.wait_for_everyone()
    return last


def choose_precision(precision: str) -> str:
    """Return accelerate's name of the precision: bf16 where the hardware multiplies it natively."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return "bf16" if precision == "bf16" or precision == "auto" and multiplies_bf16(device) else "no"


def learning_rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, then cosine over progress 0 to 1."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    floor = config.final_learning_rate_ratio
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def _take_step(
    objective: nn.Module,
    optimizer: AcceleratedOptimizer,
    accelerator: Accelerator,
    batches: Iterator[MicroBatch],
    meter: Meter,
    config: TrainConfig,
    cast: torch.autocast,
) -> None:
    """Take one optimizer step on the mean of the losses of its micro-batches."""
    for _ in range(config.accumulate):
        batch = next(batches)
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


def validate(task: Task, objective: nn.Module, state: RunState, accelerator: Accelerator) -> dict[str, float]:
    """Return the task's validation figures as the log names them; the averaged weights are what is judged."""
    assert task.validate is not None
    # Under ZeRO 3 every process holds a share of the weights, and each layer gathers its own.
    in_shares = isinstance(state, DeepSpeedState) and state.stage == 3
    objective.eval()
    try:
        with torch.no_grad(), contextlib.nullcontext() if in_shares else state.export_weights():
            own = task.validate(accelerator.process_index, accelerator.num_processes)
    finally:
        objective.train()
    everyone: list[Figures] = gather_object([own])
    sums = {name: [sum(each) for each in zip(*(one[name] for one in everyone), strict=True)] for name in own}
    return {f"{VALIDATION}{name}": float(total / count) for name, (total, count) in sums.items()}


def repeated_blocks(objective: nn.Module) -> list[nn.Module]:
    """Return the blocks of which stacks are made: modules of several layers that stand in lists."""
    lists = [module for module in objective.modules() if isinstance(module, nn.ModuleList)]
    return [block for each in lists for block in each if any(True for _ in block.children())]


@contextlib.contextmanager
def prepared_blocks(objective: nn.Module, config: TrainConfig) -> Iterator[None]:
    """Compile repeated blocks and compute their activations again, as the settings say, inside the block."""
    blocks = repeated_blocks(objective) if config.compile or config.gradient_checkpointing else []
    if config.compile:
        refuse_without_compiler()
    for block in blocks:
        run = torch.compile(block.forward) if config.compile else block.forward
        if config.gradient_checkpointing:
            run = functools.partial(checkpoint, run, use_reentrant=False)
        block.forward = run
    try:
        yield
    finally:
        for block in blocks:
            del block.forward  # the class's own stays


def refuse_without_compiler() -> None:
    """Raise ConfigError where torch.compile would find nothing to compile with."""
    compiler = os.environ.get("CXX", "g++")
    if torch.cuda.is_available():
        if importlib.util.find_spec("triton") is None:
            raise ConfigError(
                "train.compile needs the package triton: pip install triton, or set it to false"
            )
    elif shutil.which(compiler) is None:
        raise ConfigError(f"train.compile needs a C++ compiler ({compiler}): install one, or set it to false")


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
    pairs = ((matrices, weight_decay), (vectors, 0.0))
    return [{"params": group, "weight_decay": decay} for group, decay in pairs if group]
