"""What a recipe hands to the training loop (settings, objective, batches), and its command line."""

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from duotok.tokenizer.common.command import guard, show_progress_messages
from duotok.tokenizer.common.errors import ConfigError


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
    # Processes beside each training process that draw its batches ahead; 0: it draws them itself, in between.
    workers: int | None = None  # None: some where CUDA trains, else 0, for the cores are the model's
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
    # Named figures of the model as it is, on held-out data: "metric" or "metric/case". Runs without
    # gradients, in eval mode, with the averaged weights; on the main process, under ZeRO 3 on every one.
    validate: Callable[[], dict[str, float]] | None = None
    unit: str = "tokens"  # what count_units counts; the log's name of the speed
    count_units: Callable[[dict[str, Tensor]], int] | None = None  # of a batch
    count_flops: Callable[[dict[str, Tensor]], float] | None = None  # of a batch, forward and backward
    takes_step: bool = False  # the objective also gets "step" [], int64: the optimizer steps taken before


def recipe_main(description: str, config_class: type, build: Callable[[Any], Task]) -> Callable[..., int]:
    """Return a recipe's main(argv=None): `CONFIG.yaml --out DIR [--minutes M] [--set key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("config", type=Path, help="YAML file of the recipe")
    add("--out", type=Path, required=True, help="folder of the run: checkpoint, log.jsonl, final")
    add("--minutes", type=float, help="train for this long in all instead of train.steps")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    add("--deepspeed", type=Path, help="DeepSpeed config; start with torchrun")
    add("--wandb", metavar="PROJECT", help="log to this project of Weights & Biases as well (train.wandb)")

    def train(arguments: argparse.Namespace) -> None:
        import torch

        from duotok.recipes.training.loop import train_recipe
        from duotok.tokenizer.common.config import load_config

        show_progress_messages()
        overrides = [*arguments.set, *([f"train.wandb={arguments.wandb}"] if arguments.wandb else [])]
        config = load_config(config_class, arguments.config, overrides)
        losses = train_recipe(
            build, config, arguments.out, minutes=arguments.minutes, deepspeed=arguments.deepspeed
        )
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        told = " ".join(f"{name}={value:.4f}" for name, value in losses.items())
        if os.environ.get("RANK", "0") == "0":
            print(f"{told} -> {arguments.out / 'final'}")

    def main(argv: Sequence[str] | None = None) -> int:
        arguments = parser.parse_args(argv)
        again = "run the same command again to go on from the last checkpoint"
        return guard(lambda: train(arguments), interrupted=again)

    return main
