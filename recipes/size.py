"""Parameters of recipes by part, and memory per device under ZeRO 0 to 3: computed, not guessed.

Run: python -m duotok.recipes.size recipes/tokenizer/stage1/base.yaml recipes/lm/base.yaml [--devices 8]
         [--out size.json] [--no-activations] [--step] [--set train.batch_size=4]
Every model is built from its recipe without memory for its weights and counted. Weights, gradients and
AdamW's state per device follow from the counts (see sizing/memory.py). Activations are measured on the same
model at full width, 1 and 2 blocks deep, on 2 s of noise, and scaled to the recipe's depth, length and batch.
--step also takes one real bf16 training step of each recipe at full size on short noise, saves the result and
reads it back. Lyrics are tokenized by a stand-in of --text-tokens tokens where the recipe's `text` is not a
file or folder here. Prints Markdown; --out writes the same figures as JSON.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.command import guard

if TYPE_CHECKING:
    from duotok.recipes.sizing.dry_recipe import DryRecipe

GIGA = 1e9


def measure_size(recipe: "DryRecipe", *, devices: int, activations: bool) -> dict[str, Any]:
    """Figures of one recipe: {"parts", "trainable", "frozen", "precision", "zero", "activations_gb", ...}."""
    from duotok.recipes.sizing.memory import (
        ZERO_STAGES,
        PartSize,
        count_parts,
        estimate_activations,
        state_bytes,
    )
    from duotok.recipes.training.loop import choose_precision

    parts = count_parts(recipe)
    whole = sum(parts.values(), PartSize())
    precision = "bf16" if choose_precision(recipe.train.precision) == "bf16" else "fp32"
    scale = recipe.scale
    figures: dict[str, Any] = {
        "recipe": str(recipe.path),
        "parts": {name: {"trainable": p.trainable, "frozen": p.frozen} for name, p in parts.items()},
        "trainable": whole.trainable,
        "frozen": whole.frozen,
        "precision": precision,
        "devices": devices,
        "batch_size": scale.batch_size,
        "seconds": scale.seconds,
        "zero": {},
    }
    for zero in ZERO_STAGES:
        averaged = recipe.train.ema_decay > 0
        state = state_bytes(whole, precision=precision, zero=zero, devices=devices, averaged=averaged)
        names = ("weights", "gradients", "optimizer", "average", "buffers", "total")
        figures["zero"][str(zero)] = {f"{name}_gb": round(getattr(state, name) / GIGA, 4) for name in names}
    if activations:
        found = estimate_activations(recipe, precision)
        figures["activations_gb_per_example"] = round(found.per_example / GIGA, 4)
        figures["activations_gb"] = round(found.per_example * scale.batch_size / GIGA, 4)
        figures["autocast_copies_gb"] = round(found.fixed / GIGA, 4)
    return figures


def render_size(rows: Sequence[Mapping[str, Any]]) -> str:
    """The figures as Markdown: parameters by part, memory per device, and the steps that were taken."""
    lines = ["| recipe | part | trainable | frozen |", "|---|---|---:|---:|"]
    for row in rows:
        for name, part in row["parts"].items():
            if part["trainable"] or part["frozen"]:
                lines.append(f"| {row['recipe']} | {name} | {part['trainable']:,} | {part['frozen']:,} |")
        lines.append(f"| {row['recipe']} | **all** | **{row['trainable']:,}** | **{row['frozen']:,}** |")
    lines += [
        "",
        f"Memory per device in GB (10^9 bytes), {rows[0]['devices']} devices: weights + gradients + AdamW + "
        "buffers; activations of the recipe's batch come on top.",
        "",
        "| recipe | precision | ZeRO 0 | ZeRO 1 | ZeRO 2 | ZeRO 3 | activations (batch) |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        states = " | ".join(f"{state['total_gb']:.2f}" for state in row["zero"].values())
        kept = row.get("activations_gb")
        batch = f"{row['batch_size']} x {row['seconds']:g} s"
        shown = "not measured" if kept is None else f"{kept:.1f} ({batch})"
        lines.append(f"| {row['recipe']} | {row['precision']} | {states} | {shown} |")
    stepped = [row for row in rows if "step" in row]
    if stepped:
        lines += [
            "",
            "| one bf16 step of | loss | build | step | save | load | peak memory |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
    for row in stepped:
        step = row["step"]
        times = " | ".join(f"{step[f'{name}_seconds']:.1f} s" for name in ("build", "step", "save", "load"))
        lines.append(f"| {row['recipe']} | {step['loss']:.3f} | {times} | {step['peak_memory_gb']:.2f} GB |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Parameters and memory per device of recipes.")
    parser.add_argument("recipes", nargs="+", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--devices", type=int, default=8, help="devices that ZeRO shards over")
    parser.add_argument("--out", type=Path, help="JSON file of the figures")
    parser.add_argument("--no-activations", action="store_true", help="leave the activations out")
    parser.add_argument("--step", action="store_true", help="take one bf16 training step of each recipe")
    parser.add_argument("--step-seconds", type=float, default=0.5, help="length of the step's examples")
    parser.add_argument("--step-batch", type=int, default=2, help="the step's examples, at least 2")
    parser.add_argument(
        "--work", type=Path, help="where the step writes for the time being (16 bytes a weight)"
    )
    parser.add_argument("--text-tokens", type=int, default=119_547, help="of the stand-in for `text`")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)
    if arguments.devices < 1 or arguments.step_batch < 2:
        parser.error("--devices must be at least 1 and --step-batch at least 2")

    def measure() -> None:
        from duotok.recipes.sizing.dry_recipe import open_recipe
        from duotok.recipes.sizing.step import step_in_subprocess
        from duotok.tokenizer.common.files import write_json

        recipes = [
            open_recipe(path, arguments.set, text_tokens=arguments.text_tokens) for path in arguments.recipes
        ]
        steps, rows = {}, []
        # The steps come first: what the measurements leave allocated here would be missing there.
        for path in arguments.recipes:
            if arguments.step:
                steps[path] = step_in_subprocess(
                    path,
                    arguments.set,
                    text_tokens=arguments.text_tokens,
                    seconds=arguments.step_seconds,
                    batch=arguments.step_batch,
                    work=arguments.work,
                )
        for recipe in recipes:
            row = measure_size(recipe, devices=arguments.devices, activations=not arguments.no_activations)
            rows.append(row | ({"step": steps[recipe.path]} if recipe.path in steps else {}))
            if arguments.out is not None:
                write_json(arguments.out, rows)
        print(render_size(rows))

    return guard(measure)


if __name__ == "__main__":
    sys.exit(main())
