"""finetune: the model of this package learns a person's own songs and becomes a model of its own.

Run: finetune --songs FOLDER --out MODEL [--lora 8] [--minutes 20]
     generate --vocal song.wav --model MODEL
FOLDER holds recordings of whole songs, which are separated first, or pairs: a folder per song with vocal.wav
and accompaniment.wav (or drums, bass, other). Run the same command again to go on after an interruption.
"""

import argparse
import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.finetuning.finetune_settings import FEWEST_TO_HOLD_OUT, FinetuneSettings
from duotok.tokenizer.common.command import add_completion, guard

if TYPE_CHECKING:
    import torch

    from duotok.recipes.accompany.bundle import Bundle
    from duotok.recipes.corpus.songs.recordings import SongFile
    from duotok.recipes.finetuning.song_tokens import Listened
    from duotok.recipes.separation.stems import Separator

_USE_CPU = "ACCELERATE_USE_CPU"


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    default = FinetuneSettings()
    parser = argparse.ArgumentParser(
        prog="finetune",
        description="Learns your own songs and writes a model folder for generate --model. Recordings of "
        "whole songs are separated first; a folder per song with vocal.wav and accompaniment.wav is taken as "
        "it is.",
    )
    add = parser.add_argument
    add("--songs", type=Path, required=True, metavar="DIR", help="folder of songs (or a text list of them)")
    add("--out", type=Path, required=True, metavar="MODEL", help="folder of the new model")
    told = "to start from: a folder, or owner/name[@revision] on the hub (default: the model of this package)"
    add("--model", metavar="MODEL", help=told)
    add("--name", help="name of the new model in reports (default: the folder's)")
    told = "train low-rank adapters instead of all weights; needs peft"
    add("--lora", dest="lora_rank", type=int, metavar="RANK", help=told)
    length, shown = parser.add_mutually_exclusive_group(), "(default: %(default)s)"
    told = f"of training {shown}"
    length.add_argument("--steps", type=int, default=default.steps, metavar="N", help=told)
    length.add_argument("--minutes", type=float, metavar="M", help="train for this long instead of --steps")
    told = f"{default.full_learning_rate:g}; with --lora {default.lora_learning_rate:g}"
    add("--learning-rate", type=float, metavar="X", help=f"peak (default: {told})")
    told = f"windows of 5 s in a step {shown}; lower it when memory runs out"
    add("--batch", dest="batch_size", type=int, default=default.batch_size, metavar="N", help=told)
    told = "of the songs that is not learned but tells when to stop, at least one of "
    told += f"{FEWEST_TO_HOLD_OUT} or more songs (default: %(default)s; 0 learns all)"
    share = default.held_out_share
    add("--held-out", dest="held_out_share", type=float, default=share, metavar="SHARE", help=told)
    told = "of whole songs: mask-head (default), demucs, bs-roformer or spleeter, when installed"
    add("--separator", default="mask-head", metavar="NAME", help=told)
    add("--checkpoint", metavar="PATH", help="of the separator (default: the bundle's, or the package's)")
    add("--work", type=Path, metavar="DIR", help="where to keep what is heard (default: MODEL.work, removed)")
    add("--seed", type=int, default=default.seed, metavar="N", help=f"of the training {shown}")
    add("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"), help="where to compute")
    add_completion(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = build_parser().parse_args(argv)
    return guard(lambda: print(_finetune(arguments)))


def _finetune(arguments: argparse.Namespace) -> str:
    known = {each.name for each in fields(FinetuneSettings)}
    settings = FinetuneSettings(**{name: value for name, value in vars(arguments).items() if name in known})
    from duotok.recipes.accompany.bundle import find_bundle, load_bundle
    from duotok.recipes.accompany.pipeline import choose_device
    from duotok.recipes.corpus.songs.recordings import find_songs
    from duotok.recipes.finetuning.learning import require_free, require_peft, train_model
    from duotok.recipes.finetuning.song_tokens import discard_unfinished

    # What is missing is found out before hours of listening.
    require_free(arguments.out)
    if settings.lora_rank is not None:
        require_peft()
    work = arguments.work or arguments.out.with_name(f"{arguments.out.name}.work")
    discard_unfinished(work)  # what a killed run left must not be taken for songs
    songs = find_songs(arguments.songs)
    device = choose_device(arguments.device)
    source = find_bundle(arguments.model)
    bundle = load_bundle(source)
    listened = _listen(arguments, songs, bundle, source, work, device)
    with _kept_on(arguments.device):
        report = train_model(
            bundle,
            source,
            listened,
            settings,
            run=work / f"run-{arguments.out.name}",
            out=arguments.out,
            name=arguments.name or arguments.out.name,
            device=device,
        )
    if arguments.work is None:
        shutil.rmtree(work, ignore_errors=True)
    return summarize(arguments.out, report)


@contextlib.contextmanager
def _kept_on(device: str) -> Iterator[None]:
    """Keep accelerate, which takes a GPU where there is one, on the CPU where that is asked for."""
    before = os.environ.get(_USE_CPU)
    if device == "cpu":
        os.environ[_USE_CPU] = "true"
    try:
        yield
    finally:
        os.environ.pop(_USE_CPU, None)
        if before is not None:
            os.environ[_USE_CPU] = before


def _listen(
    arguments: argparse.Namespace,
    songs: "list[SongFile]",
    bundle: "Bundle",
    source: Path,
    work: Path,
    device: "torch.device",
) -> "Listened":
    """Separate and tokenize the songs that can be used."""
    from duotok.recipes.accompany.bundle import read_bundle_description
    from duotok.recipes.finetuning.song_tokens import SongListener, listen_to_songs
    from duotok.recipes.separation.adapters import open_separator
    from duotok.tokenizer.common.errors import ConfigError

    def open_chosen() -> "Separator":
        own = arguments.separator == "mask-head" and arguments.checkpoint is None
        if own and not (source / "separator").is_dir():
            mixes = sum(not song.stems for song in songs)
            raise ConfigError(
                f"{mixes} of the {len(songs)} songs are mixes and the model {source} has no separator; "
                "choose --separator demucs, or give a folder per song with vocal.wav and accompaniment.wav"
            )
        return open_separator(arguments.separator, str(source) if own else arguments.checkpoint, str(device))

    # What the separated vocals depend on.
    own_separator = read_bundle_description(source).get("components", {}).get("separator", "")
    name = f"{arguments.separator} {arguments.checkpoint or own_separator}".strip()
    listener = SongListener(bundle.tokenizer, open_chosen, device)
    return listen_to_songs(songs, work, listener, separator_name=name)


def summarize(out: Path, report: dict[str, Any]) -> str:
    """The closing lines of the command."""
    learned, held_out = report["learned"], report["held_out"]
    parts = [f"{out}: {learned['songs']} songs learned"]
    parts.append(f"loss on them {_arrow(learned)} nats per token")
    if held_out["songs"]:
        parts.append(f"on {held_out['songs']} held out {_arrow(held_out)}")
        if report["kept_step"] == 0:
            parts.append("which never fell: the model is the one it started from")
        else:
            parts.append(f"kept after {report['kept_step']} of {report['steps_taken']} steps")
    if report["left_out"]:
        parts.append(f"{len(report['left_out'])} songs left out")
    return ", ".join(parts)


def _arrow(losses: dict[str, Any]) -> str:
    return f"{losses['loss_before_nats']:.3f} -> {losses['loss_after_nats']:.3f}"


if __name__ == "__main__":
    sys.exit(main())
