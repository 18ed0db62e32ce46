"""One training loop for every recipe: accelerate, time or step budgets, exact resume, logs, EMA.

Every step is a pure function of (weights, optimizer, seed, step): its batch and its random numbers are drawn
from generators seeded by (seed, step), so resuming needs no loader or generator state.
"""

import json
import math
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import Tensor, nn
from tqdm import tqdm

from duotok.recipes.training_deepspeed import DeepSpeedState, make_accelerator
from duotok.recipes.training_state import TrainingState
from duotok.tokenizer.common.errors import ConfigError, DuoTokError


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the loop: AdamW with warm-up and cosine decay (P C.3)."""

    steps: int = 1000  # optimizer steps of the whole run
    batch_size: int = 8  # examples per process and step
    learning_rate: float = 5e-4  # peak
    warmup_steps: int = 50
    final_learning_rate_ratio: float = 0.05  # of the peak, at the end of the cosine
    weight_decay: float = 0.01
    gradient_clip: float = 1.0  # global norm
    ema_decay: float = 0.0  # exponential moving average of the weights; 0 turns it off
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware multiplies it natively
    checkpoint_minutes: float = 3.0
    log_every: int = 20  # steps
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"train.precision must be auto, fp32 or bf16, got {self.precision!r}")
        for name in ("steps", "batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass
class Task:
    """What a recipe trains."""

    objective: nn.Module  # forward(**batch) -> named scalar losses; "total" is minimized
    make_batch: Callable[[np.random.Generator], dict[str, Tensor]]  # pure function of the generator
    export: Callable[[Path], object]  # writes the finished component from the objective's weights


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
    config file. Returns the last losses.
    """
    torch.manual_seed(config.seed)
    precision = choose_precision(config.precision)
    if deepspeed is None:
        accelerator = Accelerator(mixed_precision=precision)
    elif config.ema_decay > 0:
        raise ConfigError("train.ema_decay must be 0 under DeepSpeed, which shards the weights")
    else:
        accelerator = make_accelerator(deepspeed, precision, config.gradient_clip)
    parameters = {n: p for n, p in task.objective.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(
        _decay_groups(parameters, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.98)
    )
    objective, optimizer = accelerator.prepare(task.objective, optimizer)
    if deepspeed is None:
        state = TrainingState(parameters, optimizer.optimizer, use_ema=config.ema_decay > 0)
    else:
        state = DeepSpeedState(accelerator, parameters)
    casts_inputs = deepspeed is not None and precision == "bf16"
    is_main = accelerator.is_main_process
    out.mkdir(parents=True, exist_ok=True)
    state.load(out / "checkpoint")
    objective.train()
    clock = _Clock(state.elapsed_seconds, minutes)
    limit = config.steps if minutes is None else 10**9
    last: dict[str, float] = {}
    first_step = state.step
    with _Prefetch(task.make_batch, config.seed, accelerator, state.step) as batches:
        progress = tqdm(
            initial=state.step, total=limit if minutes is None else None, unit="step", disable=None
        )
        while state.step < limit and not _agree(accelerator, clock.is_over()):
            factor = learning_rate_factor(config, state.step, clock.progress(state.step, config.steps))
            for group in optimizer.param_groups:
                group["lr"] = config.learning_rate * factor
            torch.manual_seed(_mix_seed(config.seed, state.step, accelerator.process_index))
            # DeepSpeed stores bf16 weights and leaves it to us that floating-point inputs meet them.
            with torch.autocast(accelerator.device.type, torch.bfloat16, enabled=casts_inputs):
                losses = objective(**batches.next())
            accelerator.backward(losses["total"])
            norm = accelerator.clip_grad_norm_(parameters.values(), config.gradient_clip)
            optimizer.step()
            optimizer.zero_grad()
            state.step += 1
            state.update_ema(config.ema_decay)
            progress.update()
            if state.step % config.log_every == 0 or state.step in (1, limit):
                last = {name: float(value.detach()) for name, value in losses.items()}
                if is_main:
                    _log(out, state.step, clock.elapsed(), config.learning_rate * factor, norm, last)
                progress.set_postfix({"loss": f"{last['total']:.4f}"})
                if not math.isfinite(last["total"]):
                    raise DuoTokError(
                        f"the loss is not finite at step {state.step}; the last good checkpoint is in "
                        f"{out / 'checkpoint'}; lower train.learning_rate"
                    )
            if _agree(accelerator, clock.checkpoint_due(config.checkpoint_minutes)):
                _save(state, clock, out, is_main)
            if stop_after is not None and state.step - first_step >= stop_after:
                break
        progress.close()
    _save(state, clock, out, is_main)
    if state.step >= limit or _agree(accelerator, clock.is_over()):
        with state.export_weights():
            if is_main:
                task.export(out / "final")
    accelerator.wait_for_everyone()
    return last


def choose_precision(precision: str) -> str:
    """Return accelerate's name of the precision: bf16 where the hardware multiplies it natively."""
    if precision == "fp32":
        return "no"
    if precision == "bf16":
        return "bf16"
    if torch.cuda.is_available():
        return "bf16" if torch.cuda.is_bf16_supported() else "no"
    has_bf16 = getattr(torch.cpu, "_is_avx512_bf16_supported", None)
    return "bf16" if has_bf16 is not None and has_bf16() else "no"


def learning_rate_factor(config: TrainConfig, step: int, progress: float) -> float:
    """Return the share of the peak learning rate: linear warm-up, then cosine over progress 0 to 1."""
    warmup = min(1.0, (step + 1) / max(1, config.warmup_steps))
    floor = config.final_learning_rate_ratio
    return warmup * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


class _Clock:
    """Time spent on the run, earlier pieces included."""

    def __init__(self, before_seconds: float, minutes: float | None) -> None:
        self._start = time.monotonic() - before_seconds
        self._budget = None if minutes is None else minutes * 60
        self._last_checkpoint = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self._start

    def is_over(self) -> bool:
        return self._budget is not None and self.elapsed() >= self._budget

    def progress(self, step: int, steps: int) -> float:
        return step / steps if self._budget is None else self.elapsed() / self._budget

    def checkpoint_due(self, minutes: float) -> bool:
        if time.monotonic() - self._last_checkpoint < minutes * 60:
            return False
        self._last_checkpoint = time.monotonic()
        return True


class _Prefetch:
    """Draws the next batches in a thread while the current step computes."""

    DEPTH = 2

    def __init__(self, make_batch: Callable, seed: int, accelerator: Accelerator, first_step: int) -> None:
        self._make_batch, self._seed, self._accelerator = make_batch, seed, accelerator
        self._next_step = first_step
        self._futures: list[Future] = []
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> "_Prefetch":
        for _ in range(self.DEPTH):
            self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> dict[str, Tensor]:
        batch = self._futures.pop(0).result()
        self._submit()
        return {name: tensor.to(self._accelerator.device) for name, tensor in batch.items()}

    def _submit(self) -> None:
        key = (self._seed, self._next_step, self._accelerator.process_index)
        self._futures.append(self._pool.submit(self._make_batch, np.random.default_rng(key)))
        self._next_step += 1


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict]:
    """Vectors (norms, biases) do not decay."""
    matrices = [p for p in parameters.values() if p.ndim >= 2]
    vectors = [p for p in parameters.values() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def _mix_seed(*key: int) -> int:
    return int(np.random.SeedSequence(key).generate_state(1)[0])


def _agree(accelerator: Accelerator, decision: bool) -> bool:
    """Take the first process's decision everywhere: the clocks of processes differ."""
    if accelerator.num_processes == 1:
        return decision
    return bool(broadcast_object_list([decision])[0])


def _save(state: TrainingState | DeepSpeedState, clock: _Clock, out: Path, is_main: bool) -> None:
    state.elapsed_seconds = clock.elapsed()
    # Plain data parallelism holds the same state on every process; DeepSpeed's is sharded over all.
    if is_main or isinstance(state, DeepSpeedState):
        state.save(out / "checkpoint")


def _log(
    out: Path, step: int, seconds: float, learning_rate: float, norm: object, losses: dict[str, float]
) -> None:
    row = {
        "step": step,
        "seconds": round(seconds, 2),
        "learning_rate": learning_rate,
        "gradient_norm": 0.0 if norm is None else float(norm),  # DeepSpeed has none before its first step
        **{name: round(value, 6) for name, value in losses.items()},
    }
    with (out / "log.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
