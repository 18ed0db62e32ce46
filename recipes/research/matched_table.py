"""Listening to the decoders of the matched-decoder protocol, and their table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from duotok.recipes.accompany.pipeline import choose_device
from duotok.recipes.evaluation.excerpts import Excerpt, choose_excerpts, read_split
from duotok.recipes.evaluation.sound_quality import LIVELINESS, MEASURES, measure_quality
from duotok.recipes.renderer.latent_shards import pad_to_frames
from duotok.recipes.research.matched_codecs import FrozenCodec
from duotok.recipes.research.matched_settings import Config
from duotok.renderer.diffusion import DiffusionDecoder
from duotok.renderer.renderer import Renderer, open_vae

Row = dict[str, Any]


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
        rows.append(measure_quality(wave, renderer.decode(latents, wave.shape[-1]).cpu()))
    parameters = sum(parameter.numel() for parameter in decoder.parameters())
    return _mean(rows) | {"decoder_parameters": parameters}


@torch.no_grad()
def show_ceiling(config: Config) -> Row:
    """The line of the autoencoder alone: what a perfect decoder of perfect codes would reach."""
    vae = open_vae(config.vae)
    rows = []
    for excerpt in choose(config):
        wave = excerpt.read(config.track)
        rows.append(measure_quality(wave, vae.decode(vae.encode(wave[None]), wave.shape[-1])[0]))
    return {"codec": "latents themselves", "kind": "vae", **_mean(rows)}


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


def _mean(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: float(np.mean([row[name] for row in rows])) for name in rows[0]}
