"""Compare ways to lay out two tracks as one sequence, under equal budgets (P B.1.2).

- plain prompt: the paper's; positions run on from the vocal to the accompaniment;
- shared positions: frame i of the accompaniment stands at the position of the vocal's frame i;
- aligned vocal: in addition, the step that predicts frame i carries the vocal's code of it.

Run: python -m duotok.recipes.research.layouts recipes/lm/small.yaml --held-out data/tokens/test --steps 500 \
         --out runs/layouts --set data.tokens=data/tokens/train --set tokenizer=runs/small/stage3/final
The same steps on the same batches for each; a finished layout is not trained again, an interrupted one goes
on. table.md and table.json are rewritten after each.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import read_json, write_json, write_text

LAYOUTS: dict[str, dict[str, bool]] = {
    "plain prompt": {"shared_positions": False, "aligned_source": False},
    "shared positions": {"shared_positions": True, "aligned_source": False},
    "aligned vocal": {"shared_positions": True, "aligned_source": True},
}
COLUMNS = {  # figure of the `lm` part of `score`: heading and decimals
    "cnbpt_unconditional_accompaniment": ("accompaniment alone, cnBPT", 4),
    "cnbpt_vocal_to_accompaniment": ("from the vocal, 2 s given, cnBPT", 4),
    "cnbpt_vocal_to_accompaniment_first_5s": ("first 5 s, nothing given, cnBPT", 4),
    "mismatch_cost_percent": ("mismatch cost, 2 s given, %", 1),
    "mismatch_cost_first_5s_percent": ("mismatch cost, first 5 s, %", 1),
}


def train_layout(config: Any, changes: Mapping[str, bool], steps: int, folder: Path) -> Path:
    """Train a model of one layout unless it is there; return its folder."""
    from duotok.recipes.lm.train import build
    from duotok.recipes.training.loop import run_training

    config = replace(config, model=replace(config.model, **changes), train=replace(config.train, steps=steps))
    if not (folder / "final").exists():
        run_training(build(config), config.train, folder)
    return folder / "final"


def measure_layout(lm_folder: Path, held_out: Path, seconds: float) -> dict[str, float]:
    """Figures on one window of each held-out song that is long enough."""
    import torch

    from duotok.lm.dual_track.model import DualTrackLM
    from duotok.recipes.evaluation.coherence import pair_with_others
    from duotok.recipes.evaluation.lm_part import measure_codes
    from duotok.recipes.lm.tokens import TokenShards
    from duotok.tokenizer.model import TRACKS

    lm, shards = DualTrackLM.from_pretrained(lm_folder), TokenShards(held_out)
    if lm.tokenizer_fingerprint != shards.index.tokenizer_fingerprint:
        raise DataError(f"the tokens in {held_out} are by another tokenizer than those trained on")
    frames = round(seconds * shards.index.frame_rate_hz)
    songs = [song for song in shards.index.songs if song.frames >= frames]
    if len(songs) < 2:
        raise DataError(f"{held_out} has no two songs of {seconds:g} s; give shorter --seconds")
    rows = [shards.codes(song, 0, frames) for song in songs]
    codes = {track: torch.stack([row[track] for row in rows]) for track in TRACKS}
    partners = pair_with_others([song.song for song in songs])
    figures = measure_codes(lm, codes, partners, shards.index.frame_rate_hz, seed=0)
    return {"windows": len(songs), **{name: round(figures[name], 6) for name in COLUMNS}}


def render_table(figures: Mapping[str, Mapping[str, float]], steps: int, seconds: float) -> str:
    """Return the markdown table of {layout: figures}."""
    windows = max((row["windows"] for row in figures.values()), default=0)
    lines = [
        f"{steps} steps each on the same batches; {windows:g} held-out windows of {seconds:g} s.",
        "",
        "| layout | " + " | ".join(heading for heading, _ in COLUMNS.values()) + " |",
        "|---|" + "---:|" * len(COLUMNS),
    ]
    for layout, row in figures.items():
        cells = (f"{row[name]:.{decimals}f}" for name, (_, decimals) in COLUMNS.items())
        lines.append(f"| {layout} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Compare layouts of the dual-track language model")
    parser.add_argument("config", type=Path, help="recipe of the language model")
    parser.add_argument("--held-out", type=Path, required=True, help="token shards of songs not trained on")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs and of the table")
    parser.add_argument("--steps", type=int, default=500, help="of each layout")
    parser.add_argument("--seconds", type=float, default=30.0, help="of the windows that are scored")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)
    if arguments.steps < 1:
        parser.error("--steps must be at least 1")

    def compare() -> None:
        from duotok.recipes.lm.train import Config
        from duotok.tokenizer.common.config import load_config

        config = load_config(Config, arguments.config, arguments.set)
        table, figures = "", dict[str, dict[str, float]]()
        for layout, changes in LAYOUTS.items():
            folder = arguments.out / layout.replace(" ", "-")
            settings = {"held_out": str(arguments.held_out), "seconds": arguments.seconds}
            settings |= {"steps": arguments.steps, "overrides": arguments.set}
            done = folder / "figures.json"
            kept = read_json(done) if done.exists() else {}
            if kept.get("settings") != settings:
                lm = train_layout(config, changes, arguments.steps, folder)
                measured = measure_layout(lm, arguments.held_out, arguments.seconds)
                kept = {"settings": settings, "figures": measured}
                write_json(done, kept)
            figures[layout] = kept["figures"]
            write_json(arguments.out / "table.json", {"steps": arguments.steps, "layouts": figures})
            table = render_table(figures, arguments.steps, arguments.seconds)
            write_text(arguments.out / "table.md", table)
        print(table, end="")

    return guard(compare, interrupted="run the same command again to go on")


if __name__ == "__main__":
    sys.exit(main())
