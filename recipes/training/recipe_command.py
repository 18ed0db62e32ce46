"""The command line of every training recipe."""

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from duotok.recipes.training.task import Task
from duotok.tokenizer.common.command import guard, show_progress_messages


def recipe_main(description: str, config_class: type, build: Callable[[Any], Task]) -> Callable[..., int]:
    """Return a recipe's main(argv=None): `CONFIG.yaml --out DIR [--minutes M] [--set key=value ...]`."""
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("config", type=Path, help="YAML file of the recipe")
    add("--out", type=Path, required=True, help="folder of the run: checkpoint, log.jsonl, final")
    add("--minutes", type=float, help="train for this long in all instead of train.steps")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    add("--deepspeed", type=Path, help="DeepSpeed config; start with torchrun")
    text = "tensorboard, trackio[:PROJECT], wandb[:PROJECT] or none (train.log_to; default: tensorboard)"
    add("--log-to", metavar="WHERE", help=text)

    def train(arguments: argparse.Namespace) -> None:
        import torch

        from duotok.recipes.training.loop import train_recipe
        from duotok.tokenizer.common.config import load_config

        show_progress_messages()
        overrides = [*arguments.set, *([f"train.log_to={arguments.log_to}"] if arguments.log_to else [])]
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
