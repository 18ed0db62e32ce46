"""The command line of every training recipe."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from duotok.recipes.training.task import Task
from duotok.tokenizer.common.command import guard, show_progress_messages


def recipe_main(
    argv: Sequence[str] | None, *, description: str, config_class: type, build: Callable[[Any], Task]
) -> int:
    """Run `RECIPE CONFIG.yaml --out DIR [--minutes M] [--set key=value ...]`; return the exit code."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", type=Path, help="YAML file of the recipe")
    parser.add_argument(
        "--out", type=Path, required=True, help="folder of the run: checkpoint, log.jsonl, final"
    )
    parser.add_argument("--minutes", type=float, help="train for this long in all instead of train.steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    parser.add_argument("--deepspeed", type=Path, help="DeepSpeed config; start with torchrun")
    parser.add_argument(
        "--wandb", metavar="PROJECT", help="log to this project of Weights & Biases as well (train.wandb)"
    )
    arguments = parser.parse_args(argv)

    def train() -> None:
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

    return guard(train, interrupted="run the same command again to go on from the last checkpoint")
