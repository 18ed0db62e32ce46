"""The same diffusion decoder on the frozen codes of several tokenizers, under one budget (P 5.4, B.3.1).

Run: python -m duotok.recipes.research.matched recipes/research/matched/small.yaml --out runs/matched
For each codec in turn: encodes the corpus, trains the decoder (--minutes are for one codec), listens to
validation songs; then writes matched.md and matched.json. The same command goes on where it was stopped.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.renderer.train_diffusion import Config as DecoderConfig
from duotok.recipes.renderer.train_diffusion import DataConfig, make_task
from duotok.recipes.research.code_vectors import CodeVectors
from duotok.recipes.research.matched_codecs import FRAME_RATE_HZ, CodecConfig, FrozenCodec, open_codec
from duotok.recipes.research.matched_settings import Config
from duotok.recipes.training.loop import run_training
from duotok.renderer.renderer import open_vae
from duotok.tokenizer.common.command import guard, show_progress_messages
from duotok.tokenizer.common.config import config_to_dict, load_config
from duotok.tokenizer.common.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item


def run_comparison(config: Config, out: Path, minutes: float | None) -> None:
    """Encode, train and listen for every codec; write the table."""
    from duotok.recipes.research.matched_table import render_table, show_ceiling
    from duotok.tokenizer.common.files import write_json, write_text

    rows, table = [show_ceiling(config)], ""
    for name, codec_config in config.codec_configs().items():
        rows.append(run_codec(config, name, codec_config, out / name, minutes))
        write_json(out / "matched.json", rows)
        table = render_table(rows, config, minutes)
        write_text(out / "matched.md", table)
    print(table, end="")


def run_codec(
    config: Config, name: str, codec_config: CodecConfig, folder: Path, minutes: float | None
) -> dict[str, Any]:
    """One line of the table; what is there from an earlier run of the same settings is kept."""
    from duotok.recipes.research.matched_table import listen_to_decoder
    from duotok.tokenizer.common.files import read_json, write_json

    settings = {
        **config_to_dict(replace(config, codecs={name: config.codecs[name]})),
        "minutes": minutes,
    }
    kept, done = folder / "settings.json", folder / "result.json"
    if kept.exists() and read_json(kept) != settings:
        raise DataError(f"{folder} was made by other settings; give another --out or delete it")
    write_json(kept, settings)
    if done.exists():
        return read_json(done)
    codec, shards = prepare_codec(config, codec_config, folder)
    origin = shards.origin
    assert origin is not None
    recipe = DecoderConfig(
        tokenizer=str(folder / "codec"),
        data=DataConfig(latents=str(shards.folder), seconds=config.data.seconds, context_seconds=0.0),
        model=replace(config.model, feature_dim=codec.source.dim),
        loss=config.loss,
        train=config.train,
    )
    if not (folder / "run" / "final").is_dir():
        run_training(
            make_task(shards, origin, codec.source, recipe), config.train, folder / "run", minutes=minutes
        )
    row = {"codec": name, "kind": codec_config.kind, "feature_dim": codec.source.dim}
    row |= {"bits_per_second": codec.bits_per_second}
    row |= listen_to_decoder(config, codec, folder / "run" / "final")
    write_json(done, row)
    return row


def prepare_codec(config: Config, codec_config: CodecConfig, folder: Path) -> tuple[FrozenCodec, Any]:
    """Open (or fit) a codec and encode the training items that no shard holds yet."""
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.renderer.latent_shards import (
        LatentShards,
        ShardOrigin,
        add_items,
        pad_to_frames,
        require_latent_rate,
    )
    from duotok.recipes.research.matched_codecs import make_mel_codec

    items = read_manifest(config.data.train)[: config.data.train_items or None]
    vae = open_vae(config.vae)
    require_latent_rate(vae, config.vae, FRAME_RATE_HZ)
    fitted = folder / "codec"
    if codec_config.kind == "mel_k_means" and fitted.is_dir():
        codec = make_mel_codec(CodeVectors.from_pretrained(fitted).tables[0], codec_config.mel_bands)
    else:
        codec = open_codec(codec_config, config.track, lambda: _waves(items[: config.data.fit_items], config))
    if isinstance(codec.source, CodeVectors):
        codec.source.save_pretrained(fitted)
    origin = ShardOrigin(
        track=config.track,
        tokenizer_fingerprint=str(codec.source.fingerprint),
        vae_fingerprint=str(vae.fingerprint),
    )

    def encode(item: "Item") -> "tuple[Tensor, Tensor]":
        wave = pad_to_frames(item.read(config.track))
        return codec.encode(wave), vae.encode_song(wave).T

    add_items(folder / "latents", items, encode, origin)
    shards = LatentShards(folder / "latents")
    if shards.origin is None:
        raise DataError(f"the manifest {config.data.train} is empty; make a corpus first")
    return codec, shards


def _waves(items: "Sequence[Item]", config: Config) -> "Iterator[Tensor]":
    return (item.read(config.track) for item in items)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the comparison; return the exit code."""
    parser = argparse.ArgumentParser(description="One decoder on the frozen codes of several tokenizers")
    parser.add_argument("config", type=Path, help="YAML file of the comparison")
    parser.add_argument("--out", type=Path, required=True, help="folder of the codecs' runs and the table")
    parser.add_argument("--minutes", type=float, help="train each decoder for this long, not for train.steps")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override a setting")
    arguments = parser.parse_args(argv)

    def compare() -> None:
        show_progress_messages()
        run_comparison(load_config(Config, arguments.config, arguments.set), arguments.out, arguments.minutes)

    return guard(compare)


if __name__ == "__main__":
    sys.exit(main())
