"""How many batches a second the loader alone gives at the base settings, and how many one GPU takes.

Run: python -m duotok.recipes.research.loader_check [--workers 2] [--tokens DIR] [--tars 'DIR/train-*.tar']
Batches of the language model are drawn from token shards, those of the tokenizer's stage 3 from tars;
where none are named, made up ones of the same lengths serve. No model is there: a GPU is taken to multiply at
40 % of the 989 TFLOP/s that are stated of an H100 (bf16, dense), and what one core takes for a batch tells
how many of them keep it busy.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json

if TYPE_CHECKING:
    from duotok.recipes.training.task import Task

RECIPES = Path(__file__).parents[1]
FLOPS = 0.4 * 989e12  # of one H100, in use
FEWEST_BATCHES = 3  # that are timed


def lm_batches(tokens: str) -> "tuple[Task, float]":
    """Batches of recipes/lm/base.yaml from token shards, and the mean floating-point operations of one."""
    import numpy as np
    import torch
    from accelerate import init_empty_weights

    from duotok.lm.dual_track.model import DualTrackLM
    from duotok.recipes.lm.data import WindowSource
    from duotok.recipes.lm.tokens import TokenShards
    from duotok.recipes.lm.train import Config, batch_flops
    from duotok.recipes.training.task import Task
    from duotok.tokenizer.common.config import load_config

    config = load_config(Config, RECIPES / "lm/base.yaml", [f"data.tokens={tokens}", "data.hold_out=0"])
    with init_empty_weights():  # what lays windows out
        lm = DualTrackLM(config.model)
    source = WindowSource(TokenShards(tokens), config.data, lm, config.train.batch_size)
    drawn = [source.make_batch(np.random.default_rng(number)) for number in range(8)]
    flops = float(np.mean([batch_flops(config.model, batch) for batch in drawn]))
    return Task(torch.nn.Identity(), source.make_batch, lambda folder: None), flops


def tokenizer_batches(tars: str) -> "tuple[Task, float]":
    """Batches of recipes/tokenizer/stage3/base.yaml from tars, and the floating-point operations of one.

    6 for each frame and trained weight, 2 for each frozen one, as if all were applied at 25 Hz.
    """
    import torch
    from accelerate import init_empty_weights

    from duotok.recipes.tokenizer.cuts import CutSampler, collate_cuts
    from duotok.recipes.tokenizer.stage3 import Config
    from duotok.recipes.training.task import Task
    from duotok.tokenizer.common.config import load_config
    from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig
    from duotok.tokenizer.objectives import DualCodebookObjective

    config = load_config(Config, RECIPES / "tokenizer/stage3/base.yaml", [f"data.manifest={tars}"])
    with init_empty_weights(include_buffers=False):
        objective = DualCodebookObjective(DuoTokenizer(DuoTokenizerConfig()), config.weights)
    sampler, size = CutSampler(config.data), config.train.batch_size

    def make_batch(rng: Any) -> dict[str, torch.Tensor]:
        cuts = [sampler.cut(rng, kind) for kind in sampler.draw_kinds(rng, size, config.mixture)]
        labels = collate_cuts(cuts, None, config.text_run_seconds, rng)
        return {"waves": torch.stack([cut.wave for cut in cuts]), **labels}

    weights = sum((6 if p.requires_grad else 2) * p.numel() for p in objective.parameters())
    flops = float(size * sampler.frames * weights)
    return Task(torch.nn.Identity(), make_batch, lambda folder: None, seek=sampler.seek), flops


def make_up_tokens(folder: Path) -> str:
    """Token shards of 64 songs of 90 s."""
    import torch

    from duotok.lm.dual_track.layout import TRACKS
    from duotok.recipes.lm.tokens import TokenIndex, append_shard

    sizes = {str(track): 32_768 for track in TRACKS}
    index = TokenIndex(tokenizer_fingerprint="made up", codebook_sizes=sizes, frame_rate_hz=25.0)
    folder.mkdir()
    codes = [{track: torch.randint(32_768, (2250,)) for track in TRACKS} for _ in range(64)]
    append_shard(folder, index, {str(n): (str(n), "train", each) for n, each in enumerate(codes)})
    return str(folder)


def make_up_tars(folder: Path) -> str:
    """Tars of four cuts of 60 s: each stem is a tone in noise, of stereo FLAC."""
    import numpy as np
    import soundfile

    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.corpus.shards import pack_items
    from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
    from duotok.tokenizer.heads import STEMS

    seconds, rng, items = 60.0, np.random.default_rng(0), []
    times = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    folder.mkdir()
    for number in range(4):
        for name in (*STEMS, "mix"):
            tone = 0.1 * np.sin(2 * np.pi * rng.uniform(80, 800) * times)
            wave = tone[:, None] + 0.01 * rng.standard_normal((len(times), 2))
            soundfile.write(folder / f"{number}.{name}.flac", wave, SAMPLE_RATE_HZ)
        items.append(
            Item(
                id=str(number), split="train", source="made up", song=str(number), seconds=seconds,
                sample_rate_hz=SAMPLE_RATE_HZ, stems={name: f"{number}.{name}.flac" for name in STEMS},
                mix=f"{number}.mix.flac", tempo_bpm=None, beats_seconds=[], downbeats_seconds=[], chords=[],
                key=None, notes=[(t, t + 0.4, 60, "la") for t in np.arange(0, seconds, 0.5).tolist()],
                voice="", style="", root=folder,
            )
        )  # fmt: skip
    pack_items(items, folder / "tars", megabytes=50)
    return f"{folder}/tars/train-*.tar"


PARTS: dict[str, tuple[Callable[[str], Any], Callable[[Path], str]]] = {
    "lm": (lm_batches, make_up_tokens),
    "tokenizer": (tokenizer_batches, make_up_tars),
}


def measure(task: "Task", flops: float, workers: int, seconds: float) -> dict[str, float]:
    """Batches per second by so many workers, core seconds for each without any, and what a GPU takes."""
    import torch

    from duotok.recipes.training.batches import open_batches
    from duotok.recipes.training.task import TrainConfig

    torch.set_num_threads(1)  # as a worker has
    figures = {"needed_per_second": FLOPS / flops}
    for count in sorted({0, workers}):
        config, device = TrainConfig(workers=count), torch.device("cpu")
        with open_batches(task, config, process=0, first_step=0, device=device) as batches:
            for _ in range(1 + 2 * count):  # those that were drawn ahead are no measure
                next(batches)
            began, core, drawn = time.monotonic(), time.process_time(), 0
            while drawn < FEWEST_BATCHES or time.monotonic() - began < seconds:
                next(batches)
                drawn += 1
            figures[f"batches_per_second_{count}_workers"] = drawn / (time.monotonic() - began)
            if count == 0:
                figures["core_seconds_per_batch"] = (time.process_time() - core) / drawn
    figures["cores_needed"] = figures["core_seconds_per_batch"] * figures["needed_per_second"]
    return figures


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.research.loader_check",
        description="Batches per second, without a model.",
    )
    option = parser.add_argument
    option("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    option("--workers", type=int, default=2, help="train.workers (default: 2)")
    option("--seconds", type=float, default=10.0, help="of each measurement (default: 10)")
    option("--tokens", metavar="DIR", help="token shards (default: made up ones)")
    option("--tars", metavar="TARS", help="audio shards or a manifest (default: made up ones)")
    option("--out", type=Path, metavar="FILE", help="where the figures go as well")
    return guard(lambda: _run(parser.parse_args(argv)))


def _run(arguments: argparse.Namespace) -> None:
    if arguments.workers < 0 or not arguments.seconds > 0:
        raise ConfigError("--workers must not be negative, --seconds be above 0")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.parts:
            make, make_up = PARTS[name]
            given = {"lm": arguments.tokens, "tokenizer": arguments.tars}[name]
            task, flops = make(given or make_up(Path(folder) / name))
            found[name] = measure(task, flops, arguments.workers, arguments.seconds)
            found[name] = {"tflop_per_batch": flops / 1e12, **found[name]}
    print(json.dumps(found, indent=2))
    if arguments.out is not None:
        write_json(arguments.out, found)


if __name__ == "__main__":
    sys.exit(main())
