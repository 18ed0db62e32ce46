"""Stage 4: the latent diffusion decoder of one track (P 3.4, C.4), on shards of the latents recipe.

Run: python -m duotok.recipes.renderer.diffusion recipes/renderer/diffusion/small.yaml --out runs/diffusion
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.renderer.latent_shards import LatentShards, ShardOrigin
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.diffusion_objective import CodeFeatures, DiffusionLossConfig, DiffusionObjective
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the shards are and how they are cut."""

    latents: str  # folder of the latents recipe
    seconds: float = 10.0  # length of a window
    context_seconds: float = 2.0  # codes before and after, for features as they are inside a song

    def __post_init__(self) -> None:
        if self.seconds < 0.04 or self.context_seconds < 0:
            raise ConfigError("data.seconds must be at least 0.04 and data.context_seconds not negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    tokenizer: str  # folder of the frozen tokenizer
    data: DataConfig
    # A decoder of the same track and VAE to go on from, instead of a new one; its tokenizer may be another.
    start_from: str | None = None
    model: DiffusionDecoderConfig = field(default_factory=DiffusionDecoderConfig)
    loss: DiffusionLossConfig = field(default_factory=DiffusionLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = LatentShards(config.data.latents)
    origin = shards.origin
    if origin is None:
        raise DataError(f"{config.data.latents} holds no shards; run duotok.recipes.renderer.latents first")
    if origin.tokenizer_fingerprint != tokenizer.fingerprint:
        raise CheckpointError(
            f"the shards in {config.data.latents} were made by the tokenizer {origin.tokenizer_fingerprint}, "
            f"{config.tokenizer} is {tokenizer.fingerprint}; make the shards again"
        )
    return make_task(shards, origin, tokenizer, config)


def make_task(shards: LatentShards, origin: ShardOrigin, tokenizer: CodeFeatures, config: Config) -> Task:
    """Make the objective and its batches for features of any tokenizer, whose codes the shards hold."""
    frames, context = round(config.data.seconds * 25), round(config.data.context_seconds * 25)
    names = [name for name, length in shards.frames.items() if length >= frames + 2 * context]
    if not names:
        raise DataError(f"no item in {config.data.latents} is as long as data.seconds and its context")
    mean, deviation = shards.statistics()
    _check_widths(config.model, tokenizer.dim, len(mean))
    torch.manual_seed(config.train.seed)
    if config.start_from is None:
        decoder = DiffusionDecoder(config.model)
        decoder.latent_mean.copy_(mean)
        decoder.latent_deviation.copy_(deviation)
    else:
        decoder = _open_start(config.start_from, config.model, origin)
    decoder.track = origin.track
    decoder.tokenizer_fingerprint = origin.tokenizer_fingerprint
    decoder.vae_fingerprint = origin.vae_fingerprint
    objective = DiffusionObjective(decoder, tokenizer, origin.track, config.loss)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        cuts = [shards.draw_cut(rng, names, frames, context) for _ in range(config.train.batch_size)]
        return {
            "codes": torch.stack([cut.codes for cut in cuts]),
            "offset": torch.tensor([cut.offset for cut in cuts]),
            "latents": torch.stack([cut.latents for cut in cuts]),
        }

    return Task(objective, make_batch, decoder.save_pretrained)


def _open_start(folder: str, model: DiffusionDecoderConfig, origin: ShardOrigin) -> DiffusionDecoder:
    decoder = DiffusionDecoder.from_pretrained(folder)
    decoder.require(track=origin.track, vae=origin.vae_fingerprint)
    if decoder.config != model:
        raise ConfigError(f"{folder} has another model than the recipe; give it the settings of that run")
    return decoder.train()


def _check_widths(model: DiffusionDecoderConfig, feature_dim: int, latent_dim: int) -> None:
    given = (model.feature_dim, model.latent_dim)
    if given != (feature_dim, latent_dim):
        raise ConfigError(
            f"model.feature_dim and model.latent_dim are {given[0]} and {given[1]}, the tokenizer and the "
            f"VAE have {feature_dim} and {latent_dim}; set them in the recipe"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Latent diffusion decoder", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
