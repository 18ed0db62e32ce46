"""What a recipe hands to the training loop: its settings, its objective and its batches."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor, nn

from duotok.tokenizer.common.errors import ConfigError

# Of each figure its sum and the number that the sum is over.
Figures = dict[str, tuple[float, float]]

TRACKERS = ("trackio", "wandb")  # packages of one interface
LOGS = ("tensorboard", *TRACKERS, "none")


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
    compile: bool = False  # repeated blocks by torch.compile, which takes minutes before the first step
    # The blocks' activations are computed again in the backward pass in place of being kept. Language models
    # have a setting of their own for it, model.gradient_checkpointing.
    gradient_checkpointing: bool = False
    precision: str = "auto"  # fp32, bf16, or auto: bf16 where the hardware multiplies it natively
    # Processes beside each training process that draw its batches ahead; 0: it draws them itself, in between.
    workers: int | None = None  # None: some where CUDA trains, else 0, for the cores are the model's
    checkpoint_minutes: float = 3.0
    log_every: int = 20  # steps
    validate_every: int = 0  # steps, where the recipe has a validation; 0 turns it off
    # Where figures go beside log.jsonl: tensorboard (where installed), trackio or wandb[:PROJECT], none.
    log_to: str = "tensorboard"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.precision not in ("auto", "fp32", "bf16"):
            raise ConfigError(f"train.precision must be auto, fp32 or bf16, got {self.precision!r}")
        kind, _, project = self.log_to.partition(":")
        if kind not in LOGS or (project and kind not in TRACKERS) or self.log_to.endswith(":"):
            raise ConfigError(
                f"train.log_to must be {', '.join(LOGS)}, or trackio:PROJECT or wandb:PROJECT, "
                f"got {self.log_to!r}"
            )
        for name in ("steps", "batch_size", "accumulate", "log_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"train.{name} must be above 0, got {getattr(self, name)}")
        for name in ("warmup_steps", "checkpoint_minutes", "validate_every", "workers"):
            if (getattr(self, name) or 0) < 0:
                raise ConfigError(f"train.{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.ema_decay < 1:
            raise ConfigError(f"train.ema_decay must be in [0, 1), got {self.ema_decay}")


@dataclass
class Task:
    """What a recipe trains."""

    objective: nn.Module  # forward(**batch) -> named scalar losses; "total" is minimized
    make_batch: Callable[[np.random.Generator], dict[str, Tensor]]  # pure function of the generator
    export: Callable[[Path], object]  # writes the finished component from the objective's weights
    # Named figures of the model as it is, on this process's share of the held-out data (process, processes):
    # "metric" or "metric/case". Runs on every process without gradients, in eval mode, with the averaged
    # weights. Each must compute as many batches as the others: under ZeRO 3 they meet in every layer.
    validate: Callable[[int, int], Figures] | None = None
    unit: str = "tokens"  # what count_units counts; the log's name of the speed
    count_units: Callable[[dict[str, Tensor]], int] | None = None  # of a batch
    count_flops: Callable[[dict[str, Tensor]], float] | None = None  # of a batch, forward and backward
    takes_step: bool = False  # the objective also gets "step" [], int64: the optimizer steps taken before
    # Told seed, process and step before each batch, of data of which only a part is at hand at a time.
    seek: Callable[[int, int, int], None] | None = None
