"""One real bf16 training step of a recipe at full size under accelerate, saved, exported and read back.

Run: python -m duotok.recipes.sizing.step recipes/tokenizer/stage1/base.yaml [--seconds 0.5] [--batch 2]
Prints one line of JSON: seconds of building, of the step, of saving and of loading, and the peak memory. The
weights are random and the audio is noise; checkpoint and export go to a temporary folder, in --work.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError, DuoTokError

if TYPE_CHECKING:
    from duotok.recipes.sizing.dry_recipe import DryRecipe

SECONDS, BATCH = 0.5, 2


def take_step(
    recipe: "DryRecipe", *, seconds: float, batch: int, work: Path | None, precision: str = "bf16"
) -> dict[str, float]:
    """Build at full depth, step once, save, export, read back; raise CheckpointError unless equal."""
    from dataclasses import replace

    import torch

    from duotok.recipes.sizing.dry_recipe import Scale
    from duotok.recipes.training.loop import run_training
    from duotok.tokenizer.common.command import peak_memory_gb

    with tempfile.TemporaryDirectory(dir=work) as name:
        folder = Path(name)
        times = [time.perf_counter()]
        scale = Scale(blocks=recipe.scale.blocks, batch_size=batch, seconds=seconds)
        task = recipe.make_task(scale, folder / "data")
        times.append(time.perf_counter())
        settings = replace(
            recipe.train, steps=1, batch_size=batch, precision=precision, ema_decay=0.0, log_every=1
        )
        losses = run_training(task, settings, folder / "run")
        times.append(time.perf_counter())
        row = json.loads((folder / "run" / "log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        trained = {name: p.detach() for name, p in task.objective.named_parameters()}
        found = recipe.load(folder / "run" / "final")
        times.append(time.perf_counter())
        # The exported model is one of the objective's children: its names there have the child's in front.
        for name, tensor in found.named_parameters():
            if not any(
                name == own.partition(".")[2] and torch.equal(tensor, p) for own, p in trained.items()
            ):
                raise CheckpointError(f"{recipe.path}: {name} is not read back as it was trained")
        disk_bytes = sum(path.stat().st_size for path in (folder / "run").rglob("*") if path.is_file())
    return {
        "loss": losses["total"],
        "build_seconds": times[1] - times[0],
        "step_seconds": float(row["seconds"]),
        "save_seconds": times[2] - times[1] - float(row["seconds"]),
        "load_seconds": times[3] - times[2],
        "disk_gb": disk_bytes / 1e9,
        "peak_memory_gb": peak_memory_gb(),
    }


def step_in_subprocess(
    path: Path,
    overrides: Sequence[str],
    *,
    text_tokens: int,
    seconds: float,
    batch: int,
    work: Path | None,
) -> dict[str, float]:
    """What this module prints for a recipe: a process of its own, so that the peak memory is its own."""
    command = [sys.executable, "-m", "duotok.recipes.sizing.step", str(path)]
    command += ["--seconds", str(seconds), "--batch", str(batch), "--text-tokens", str(text_tokens)]
    command += ["--work", str(work)] if work is not None else []
    command += [part for override in overrides for part in ("--set", override)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"ended with {done.returncode}, out of memory?"])[-1]
        raise DuoTokError(f"the step of {path} failed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="One bf16 training step of a recipe at full size.")
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="length of an example")
    parser.add_argument("--batch", type=int, default=BATCH, help="examples, at least 2")
    parser.add_argument("--work", type=Path, help="where to write for the time being")
    parser.add_argument("--text-tokens", type=int, default=119_547, help="of the stand-in for `text`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)

    def step() -> None:
        from duotok.recipes.sizing.dry_recipe import open_recipe

        recipe = open_recipe(arguments.recipe, arguments.set, text_tokens=arguments.text_tokens)
        figures = take_step(recipe, seconds=arguments.seconds, batch=arguments.batch, work=arguments.work)
        print(json.dumps({name: round(value, 3) for name, value in figures.items()}))

    return guard(step)


if __name__ == "__main__":
    sys.exit(main())
