"""Plan the full training of a language model: nodes, micro-batch, memory, speed, days, music, disk.

Run: python -m duotok.recipes.plan recipes/lm/base.yaml --devices 64 --mfu 0.4 --peak-tflops 989
         [--tokens 20e9 | --hours 100000] [--zero 1] [--out plan.md]
Everything is computed from the recipe (see sizing/run_plan.py); the utilization is a guess by --mfu, or what
a run logged, by --run RUN. --activations-gb gives what one window of the longest length keeps for the
backward pass, in place of measuring it, which takes minutes at full width.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text


def read_mfu(run: Path) -> float:
    """Return the median model-FLOPs utilization of the second half of a run's log."""
    from duotok.recipes.training.log import read_log

    found = [row["mfu"] for row in read_log(run) if row.get("mfu", 0) > 0]
    if not found:
        raise DataError(f"{run} has logged no mfu; give --mfu")
    return median(found[len(found) // 2 :])


def make_plan(arguments: argparse.Namespace, command: str) -> str:
    """Return the page."""
    from duotok.lm.dual_track.layout import TRACKS
    from duotok.recipes.sizing.dry_recipe import open_recipe
    from duotok.recipes.sizing.memory import Activations, count_parts, estimate_activations
    from duotok.recipes.sizing.plan_page import render_plan
    from duotok.recipes.sizing.run_plan import GIGA, Cluster, plan_run
    from duotok.recipes.training.loop import choose_precision
    from duotok.tokenizer.model import DuoTokenizer

    cluster = Cluster(
        devices=arguments.devices,
        devices_per_node=arguments.devices_per_node,
        device_gb=arguments.device_gb,
        reserved_share=arguments.reserved,
        peak_tflops=arguments.peak_tflops,
        mfu=arguments.mfu if arguments.run is None else read_mfu(arguments.run),
        zero=arguments.zero,
    )
    tokens = arguments.tokens
    if arguments.hours is not None:
        tokens = arguments.hours * 3600 * DuoTokenizer.frame_rate_hz * len(TRACKS)
    recipe = open_recipe(arguments.recipe, arguments.set)
    precision = "bf16" if choose_precision(recipe.train.precision) == "bf16" else "fp32"
    if arguments.activations_gb is None:
        activations = estimate_activations(recipe, precision)
    else:
        activations = Activations(per_example=arguments.activations_gb * GIGA, fixed=0.0)
    plan = plan_run(recipe, count_parts(recipe), activations, cluster, precision=precision, tokens=tokens)
    source = "given" if arguments.run is None else f"median of the second half of {arguments.run}"
    return render_plan(plan, command, mfu_source=source)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.plan", description="Plan the full training of a language model."
    )
    parser.add_argument("recipe", type=Path, metavar="CONFIG.yaml")
    parser.add_argument("--devices", type=int, required=True, help="devices of all nodes")
    parser.add_argument("--devices-per-node", type=int, default=8)
    parser.add_argument("--device-gb", type=float, default=80.0, help="memory of a device (default: 80)")
    parser.add_argument("--reserved", type=float, default=0.2, help="share of it kept free (default: 0.2)")
    parser.add_argument(
        "--peak-tflops", type=float, required=True, help="dense, in the run's precision; H100 bf16: 989"
    )
    speed = parser.add_mutually_exclusive_group(required=True)
    speed.add_argument("--mfu", type=float, help="share of the peak that the run reaches")
    speed.add_argument("--run", type=Path, help="take it from the log of this run")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--tokens", type=float, help="codes of both tracks (default: the recipe's steps)")
    length.add_argument("--hours", type=float, help="the same in hours of music")
    parser.add_argument("--zero", type=int, default=1, help="ZeRO stage (default: 1)")
    parser.add_argument("--activations-gb", type=float, help="of one window, in place of measuring it")
    parser.add_argument("--out", type=Path, help="Markdown file to write")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = parser.parse_args(given)

    def run() -> None:
        page = make_plan(arguments, " ".join(["python -m duotok.recipes.plan", *given]))
        if arguments.out is not None:
            write_text(arguments.out, page)
        print(page)

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
