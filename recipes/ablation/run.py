"""Compare variants of the tokenizer recipe under equal budgets (P D).

Run: python -m duotok.recipes.ablation.run recipes/ablation --train data/popband/train.jsonl \\
         --held-out data/popband/test.jsonl --out runs/ablation --steps stage2=1500 stage3=1500 lm=1000
Each YAML names what it changes over the recipes of --size. Stage 1 is shared by all variants, stage 2 by
those that do not differ there. Then the same language model learns both tracks unconditionally from each
variant's tokens of the same --token-items songs, and all is measured on the held-out songs. Budgets are in
steps: minutes would give less to a variant that ran while the machine was busy. Every finished piece is kept
in --out under a name made of all its settings; run the same command again to go on after an interruption, or
with more YAMLs to add them. table.md and table.json are rewritten after each variant.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.recipes.ablation.chain import Budget, Chain, Variant
from duotok.recipes.ablation.table import describe, render_table
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError, DuoTokError
from duotok.tokenizer.common.files import read_json, write_json, write_text

Config = Variant  # what a YAML of this folder holds


def read_variants(paths: Sequence[Path]) -> list[Variant]:
    """Return the variants of YAML files and of folders of them; ConfigError where two have one name."""
    files = [file for path in paths for file in (sorted(path.glob("*.yaml")) if path.is_dir() else [path])]
    if not files:
        raise ConfigError(f"no YAML of a variant in {', '.join(map(str, paths))}")
    variants = [load_config(Config, file) for file in files]
    names = [variant.name for variant in variants]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"two variants are named {twice!r}; give each a name of its own")
    return variants


def run_variants(variants: Sequence[Variant], budget: Budget) -> list[str]:
    """Run what is not there yet and write the table of what is; return the errors of variants that failed."""
    chain = Chain(budget)
    rows, errors = [], []
    for number, variant in enumerate(variants, start=1):
        print(f"variant {number} of {len(variants)}: {variant.name}", file=sys.stderr)
        try:
            rows.append(read_json(chain.run(variant)))
        except DuoTokError as error:
            errors.append(f"{variant.name}: {error}")
            continue
        comparison = describe(rows)
        write_json(budget.out / "table.json", comparison)
        write_text(budget.out / "table.md", render_table(comparison) + "\n")
    return errors


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Compare variants of the tokenizer recipe.")
    parser.add_argument("variants", nargs="+", type=Path, help="YAML files, or folders of them")
    parser.add_argument("--train", type=Path, required=True, help="manifest of the songs to learn from")
    parser.add_argument("--held-out", type=Path, required=True, help="manifest of the songs to measure on")
    parser.add_argument("--out", type=Path, required=True, help="folder of all runs and of the table")
    parser.add_argument("--size", default="small", help="recipes to change: tiny, small or base")
    parser.add_argument(
        "--steps", nargs="+", default=[], metavar="STAGE=N", help="stage1, stage2, stage3, lm"
    )
    parser.add_argument("--token-items", type=int, default=400, help="songs of the language model")
    parser.add_argument("--stage1", type=Path, help="trained tokenizer of stage 1 to start from")
    parser.add_argument("--device", default="cpu", help="of encoding and measuring: cpu, cuda or mps")
    arguments = parser.parse_args(argv)
    try:
        steps = {stage: int(count) for stage, count in (text.split("=") for text in arguments.steps)}
    except ValueError:
        parser.error(f"--steps takes STAGE=N, got {' '.join(arguments.steps)}")

    def compare() -> None:
        budget = Budget(
            train=arguments.train,
            held_out=arguments.held_out,
            out=arguments.out,
            size=arguments.size,
            steps=steps,
            token_items=arguments.token_items,
            stage1=arguments.stage1,
            device=arguments.device,
        )
        errors = run_variants(read_variants(arguments.variants), budget)
        if errors:
            raise DuoTokError("; ".join(errors))
        print((arguments.out / "table.md").read_text(encoding="utf-8"), end="")

    return guard(compare)


if __name__ == "__main__":
    sys.exit(main())
