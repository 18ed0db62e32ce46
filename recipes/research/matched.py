"""The same diffusion decoder on the frozen codes of several tokenizers, under one budget (P 5.4, B.3.1).

Run: python -m duotok.recipes.research.matched recipes/research/matched/small.yaml --out runs/matched
For each codec in turn: encodes the corpus, trains the decoder (--minutes are for one codec), listens to
validation songs; then writes matched.md and matched.json. The same command goes on where it was stopped.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from duotok.recipes.accompany.pipeline import choose_device
from duotok.recipes.evaluation.audio_metrics import LIVELINESS, MEASURES, measure_closeness
from duotok.recipes.evaluation.excerpts import Excerpt, choose_excerpts, read_split
from duotok.recipes.evaluation.renderer_part import mean_figures
from duotok.recipes.renderer.latents import pad_to_frames
from duotok.recipes.renderer.train_diffusion import Config as DecoderConfig
from duotok.recipes.renderer.train_diffusion import DataConfig, DiffusionLossConfig, make_task
from duotok.recipes.research.code_vectors import CodeVectors
from duotok.recipes.research.matched_codecs import FRAME_RATE_HZ, CodecConfig, FrozenCodec, open_codec
from duotok.recipes.training.loop import TrainConfig, run_training
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.renderer import Renderer, open_vae
from duotok.tokenizer.common.command import guard, show_progress_messages
from duotok.tokenizer.common.config import config_from_dict, load_config
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import TRACKS

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item

Row = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class MatchedDataConfig:
    """What the decoders learn from, and what they are judged on."""

    train: str  # manifest
    corpus: str  # folder with validation.jsonl (and test.jsonl)
    split: str = "validation"
    train_items: int = 0  # the first so many of the manifest; 0 = all
    fit_items: int = 60  # of these, for codecs that are fitted
    seconds: float = 10.0  # of a training window
    excerpts: int = 12
    excerpt_seconds: float = 8.0

    def __post_init__(self) -> None:
        for name in ("fit_items", "excerpts", "excerpt_seconds"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")
        if self.train_items < 0:
            raise ConfigError(f"data.train_items must not be negative, got {self.train_items}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the comparison; feature_dim of the model follows from each codec."""

    vae: str  # folder
    data: MatchedDataConfig
    codecs: dict[str, Any]  # name in the table -> settings of a CodecConfig
    track: str = "accompaniment"
    steps: int = 50  # of the solver when listening (P C.4)
    guidance: float = 2.0
    model: DiffusionDecoderConfig = field(default_factory=DiffusionDecoderConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.track not in TRACKS:
            raise ConfigError(f"track must be one of {', '.join(TRACKS)}, got {self.track!r}")
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        if not self.codecs:
            raise ConfigError("codecs must name at least one codec")
        self.codec_configs()

    def codec_configs(self) -> dict[str, CodecConfig]:
        """The checked settings of every codec."""
        return {
            name: config_from_dict(CodecConfig, settings, f"codecs.{name}")
            for name, settings in self.codecs.items()
        }


def choose(config: Config) -> list[Excerpt]:
    """The excerpts that every codec is judged on."""
    items = read_split(Path(config.data.corpus), config.data.split)
    return choose_excerpts(
        items, count=config.data.excerpts, seconds=config.data.excerpt_seconds, seed=config.train.seed
    )


@torch.no_grad()
def listen_to_decoder(config: Config, codec: FrozenCodec, folder: Path) -> Row:
    """Mean quality of recording -> codes -> latents -> sound."""
    decoder = DiffusionDecoder.from_pretrained(folder)
    decoder.require(tokenizer=codec.source.fingerprint)
    device = choose_device("auto")
    renderer = Renderer(open_vae(config.vae), {config.track: decoder}).to(device)
    assert isinstance(codec.source, nn.Module)
    codec.source.cpu()  # training may have moved it
    rows = []
    for number, excerpt in enumerate(choose(config)):
        wave = excerpt.read(config.track)
        features = codec.source.features(codec.encode(pad_to_frames(wave))[None], config.track)[0]
        latents = renderer.render_latents(
            features.to(device),
            steps=config.steps,
            guidance=config.guidance,
            seed=config.train.seed + number,
            track=config.track,
        )
        rows.append(measure_closeness(wave, renderer.decode(latents, wave.shape[-1]).cpu()))
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return mean_figures(rows) | {"decoder_parameters": parameters}


@torch.no_grad()
def show_ceiling(config: Config) -> Row:
    """The line of the autoencoder alone: what a perfect decoder of perfect codes would reach."""
    vae = open_vae(config.vae)
    rows = []
    for excerpt in choose(config):
        wave = excerpt.read(config.track)
        rows.append(measure_closeness(wave, vae.decode(vae.encode(wave[None]), wave.shape[-1])[0]))
    return {"codec": "latents themselves", "kind": "vae", **mean_figures(rows)}


def render_table(rows: Sequence[Row], config: Config, minutes: float | None) -> str:
    """The Markdown table, with the budget above it."""
    budget = f"{config.train.steps} steps" if minutes is None else f"{minutes:g} minutes"
    heads = ["codec", "bits per second", "feature width", "decoder weights"]
    heads += [*(measure.label for measure in MEASURES), "movement"]
    lines = [
        f"Matched decoder ({config.track}): {budget} of training each, batches of "
        f"{config.train.batch_size} x {config.data.seconds:g} s; {config.data.excerpts} "
        f"{config.data.split} excerpts of {config.data.excerpt_seconds:g} s, {config.steps} steps, "
        f"guidance {config.guidance:g}.",
        "",
        "| " + " | ".join(heads) + " |",
        "|" + "---|" * len(heads),
    ]
    for row in rows:
        cells = [row["codec"]]
        cells.append(f"{row['bits_per_second']:.0f}" if "bits_per_second" in row else "")
        cells.append(str(row.get("feature_dim", "")))
        cells.append(f"{row['decoder_parameters'] / 1e6:.2f}M" if "decoder_parameters" in row else "")
        cells += [f"{row[measure.name]:.3f}" for measure in MEASURES] + [f"{row[LIVELINESS]:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def run_comparison(config: Config, out: Path, minutes: float | None) -> None:
    """Encode, train and listen for every codec; write the table."""
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
    from duotok.tokenizer.common.files import read_json, write_json

    settings = {
        **asdict(replace(config, codecs={name: config.codecs[name]})),
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
    from duotok.recipes.renderer.latents import (
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
