"""What the command lines share: errors in one line, and the options of every training recipe."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.errors import DuoTokError

if TYPE_CHECKING:
    from duotok.recipes.training import Task


# Packages that only some commands need, by the name they are imported by, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("librosa", "matplotlib", "mir_eval", "sklearn"), "evaluation"),
    **dict.fromkeys(("pesq", "pystoi"), "quality"),
    **dict.fromkeys(("mido", "pyworld", "onnx", "onnxruntime"), "corpus"),
    "webdataset": "songs",
    "peft": "lora",
}


def guard(run: Callable[[], None], *, interrupted: str = "run the same command again to go on") -> int:
    """Run a command's work; return its exit code: 0, 1 (one line on stderr), 130 (interrupted)."""
    try:
        run()
    except DuoTokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f'error: {error.name} is missing; pip install "duotok[{extra}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def show_progress_messages() -> None:
    """Let the first process tell on stderr what the library logs: kernels chosen, code being compiled."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("duotok").setLevel(logging.INFO)


def leave_processes() -> None:
    """Part from the other processes of a finished run, if there are any."""
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def recipe_main(
    argv: Sequence[str] | None, *, description: str, config_class: type, build: "Callable[[Any], Task]"
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
        from duotok.recipes.training import run_training
        from duotok.tokenizer.common.config import load_config

        show_progress_messages()
        overrides = [*arguments.set, *([f"train.wandb={arguments.wandb}"] if arguments.wandb else [])]
        config = load_config(config_class, arguments.config, overrides)
        losses = run_training(
            build(config),
            config.train,
            arguments.out,
            minutes=arguments.minutes,
            deepspeed=arguments.deepspeed,
        )
        leave_processes()
        told = " ".join(f"{name}={value:.4f}" for name, value in losses.items())
        if os.environ.get("RANK", "0") == "0":
            print(f"{told} -> {arguments.out / 'final'}")

    return guard(train, interrupted="run the same command again to go on from the last checkpoint")
