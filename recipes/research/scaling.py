"""What the next hour of corpus and the next weight buy: validation loss against both, a table and a picture.

Run: python -m duotok.recipes.research.scaling recipes/lm/small.yaml --hours 5 20 \\
         --size small= --size medium=hidden_dim:384,layers:8,feed_forward_dim:1024 --steps 300 --out scaling
Trains the language model of a recipe anew for every point, all with the same number of steps on the same
windows of held-out songs; fewer hours are some of the songs of more. Every point has a run of its own under
OUT, so that what was interrupted goes on. Writes OUT/scaling.json, scaling.md and scaling.png.
"""

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.figure import Figure

from duotok.recipes.evaluation.quality_report import save_figure
from duotok.recipes.training.loop import train_recipe
from duotok.tokenizer.common.command import guard, show_progress_messages
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json, write_text

MEASURES = {
    "vocal_to_accompaniment": "accompaniment, given the vocal",
    "unconditional_accompaniment": "accompaniment alone",
    "unconditional_vocal": "vocal alone",
}


def read_sizes(texts: Sequence[str]) -> dict[str, list[str]]:
    """{name: settings} of NAME=KEY:VALUE,...; ConfigError for what is none."""
    sizes: dict[str, list[str]] = {}
    for text in texts:
        name, sign, settings = text.partition("=")
        pairs = [each.split(":") for each in settings.split(",") if each]
        if not name.isidentifier() or not sign or any(len(pair) != 2 for pair in pairs):
            raise ConfigError(f"--size must be NAME=KEY:VALUE,... of the model's settings, got {text!r}")
        sizes[name] = [f"model.{key}={value}" for key, value in pairs]
    return sizes


def measure_point(recipe: Path, out: Path, settings: Sequence[str], steps: int) -> dict[str, float]:
    """Train one model, or go on with it, and read what its last validation said."""
    from duotok.recipes.lm.train import Config, build

    if not (out / "point.json").is_file():
        settings = [*settings, f"train.steps={steps}", f"train.validate_every={steps}"]
        train_recipe(build, load_config(Config, recipe, settings), out)
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        found = {k.rpartition("cnbpt/")[2]: v for line in lines for k, v in line.items() if "cnbpt/" in k}
        if not found:
            raise ConfigError("nothing is held out to compare by; set data.hold_out or validation.tokens")
        weights = _count_weights(out / "final")
        write_json(out / "point.json", {"weights": weights, "seconds": lines[-1]["seconds"], **found})
    return json.loads((out / "point.json").read_text())


def _count_weights(folder: Path) -> int:
    from duotok.lm.dual_track.model import DualTrackLM

    return sum(weight.numel() for weight in DualTrackLM.from_pretrained(folder).parameters())


def render_table(points: Mapping[str, Mapping[str, Mapping[str, float]]], steps: int) -> str:
    """Markdown: a row for each size and number of hours. points: {size: {hours: figures}}."""
    lines = [
        f"Codebook-normalized bits per token of held-out songs after {steps} steps; lower is better.",
        "",
        f"| size | weights | hours | {' | '.join(MEASURES.values())} | minutes |",
        f"|---|---:|---:|{'---:|' * (len(MEASURES) + 1)}",
    ]
    for size, found in points.items():
        for hours, figures in found.items():
            values = " | ".join(f"{figures[name]:.4f}" for name in MEASURES)
            millions, minutes = figures["weights"] / 1e6, figures["seconds"] / 60
            lines.append(f"| {size} | {millions:.1f} M | {hours} | {values} | {minutes:.1f} |")
    return "\n".join(lines) + "\n"


def draw_points(points: Mapping[str, Mapping[str, Mapping[str, float]]], path: Path) -> None:
    """One picture for each measure: loss against hours, a line for each size."""
    figure = Figure(figsize=(4.2 * len(MEASURES), 3.6), layout="constrained")
    for axes, (name, title) in zip(figure.subplots(1, len(MEASURES)), MEASURES.items(), strict=True):
        for size, found in points.items():
            hours = [float(each) for each in found]
            axes.plot(hours, [figures[name] for figures in found.values()], marker="o", label=size)
        axes.set(title=title, xlabel="hours of corpus", ylabel="cnBPT", xscale="log")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Validation loss against hours of corpus and size.")
    add = parser.add_argument
    add("recipe", type=Path, help="YAML file of a language model")
    add("--hours", type=float, nargs="+", required=True, help="of the songs that are trained on")
    text = "a model, NAME=KEY:VALUE,... over the recipe's; any number of them (default: the recipe's)"
    add("--size", action="append", metavar="NAME=...", help=text)
    add("--steps", type=int, required=True, help="of each training")
    add("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    add("--out", type=Path, required=True, help="folder of the runs, the table and the picture")
    arguments = parser.parse_args(argv)

    def run() -> None:
        show_progress_messages()
        points: dict[str, dict[str, dict[str, float]]] = {}
        for size, settings in read_sizes(arguments.size or ["recipe="]).items():
            for hours in sorted(arguments.hours):
                own = [*arguments.set, f"data.hours={hours:g}", *settings]
                out = arguments.out / f"{size}-{hours:g}h"
                points.setdefault(size, {})[f"{hours:g}"] = measure_point(
                    arguments.recipe, out, own, arguments.steps
                )
                write_json(arguments.out / "scaling.json", {"steps": arguments.steps, "points": points})
        table = render_table(points, arguments.steps)
        write_text(arguments.out / "scaling.md", table)
        draw_points(points, arguments.out / "scaling.png")
        print(table, end="")

    return guard(run, interrupted="run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
