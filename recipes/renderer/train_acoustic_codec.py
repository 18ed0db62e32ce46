"""The acoustic codec on the VAE's latents: residual codes, from shards of the latents recipe.

Run: python -m duotok.recipes.renderer.train_acoustic_codec \\
         recipes/renderer/train_acoustic_codec/small.yaml --out runs/small/codec
It stands beside the other recipes on latents, for the codec contains the VAE.
"""

import sys
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from duotok.recipes.renderer.latents import LatentShards
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.diffusion import LATENTS_PER_FEATURE
from duotok.renderer.latent_codec import LatentCodec, LatentCodecConfig
from duotok.renderer.renderer import open_vae
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError

_START_ITERATIONS = 6  # of k-means; training goes on from there


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the latents are and how they are cut."""

    latents: tuple[str, ...]  # folders of the latents recipe, of any tracks and one VAE; drawn from alike
    seconds: float = 4.0  # length of a cut, whole code frames of the tokenizer (40 ms)
    start_frames: int = 40_000  # of the codec, that the k-means start of the codebooks sees

    def __post_init__(self) -> None:
        if not self.latents:
            raise ConfigError("data.latents must name at least one folder of the latents recipe")
        if self.seconds < 0.4 or self.start_frames < 1:
            raise ConfigError("data.seconds must be at least 0.4 and data.start_frames at least 1")


@dataclass(frozen=True, kw_only=True)
class CodecLossConfig:
    """Settings of the losses."""

    drop_levels: float = 0.5  # probability of an example to keep but the first 1 to levels codebooks
    commitment: float = 0.25  # weight of what draws the features to their codes
    codebook: float = 1.0  # weight of what draws the codes of SimVQ to their features
    weight_power: float = 1.0  # see fit_scale

    def __post_init__(self) -> None:
        if not 0 <= self.drop_levels <= 1:
            raise ConfigError(f"loss.drop_levels must be in 0..1, got {self.drop_levels}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    vae: str  # folder of the VAE that made the latents
    data: DataConfig
    model: LatentCodecConfig = field(default_factory=LatentCodecConfig)  # its VAE is the one above
    loss: CodecLossConfig = field(default_factory=CodecLossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Start the codebooks from the corpus; make the objective and its batches."""
    vae = open_vae(config.vae)
    folders = [_open_shards(folder, vae, config.vae) for folder in config.data.latents]
    frames25 = round(config.data.seconds * vae.latent_rate_hz / LATENTS_PER_FEATURE)
    if frames25 * LATENTS_PER_FEATURE % config.model.latents_per_frame:
        raise ConfigError(
            f"data.seconds {config.data.seconds:g} are no whole frames of {config.model.latents_per_frame} "
            "latents; give another length"
        )
    names = [[name for name, length in shards.frames.items() if length >= frames25] for shards in folders]
    for folder, found in zip(config.data.latents, names, strict=True):
        if not found:
            raise DataError(f"no item in {folder} is as long as data.seconds, {config.data.seconds:g}")

    def draw(rng: np.random.Generator, count: int) -> Tensor:
        chosen = rng.integers(len(folders), size=count)
        cuts = [folders[i].draw_cut(rng, names[i], frames25, 0).latents for i in chosen]
        return torch.stack(cuts)

    settings = {name: value for name, value in asdict(config.model).items() if not name.startswith("vae")}
    torch.manual_seed(config.train.seed)
    codec = LatentCodec.on_vae(vae, **settings)
    rng = np.random.default_rng((config.train.seed, 1))
    per_cut = frames25 * LATENTS_PER_FEATURE // config.model.latents_per_frame
    start = draw(rng, -(-config.data.start_frames // per_cut))
    fit_scale(codec, start, config.loss.weight_power)
    codec.quantizer.fit_to(codec.to_features(start).flatten(0, 1), iterations=_START_ITERATIONS)
    objective = CodecObjective(codec, config.loss)
    return Task(objective, lambda rng: {"latents": draw(rng, config.train.batch_size)}, codec.save_pretrained)


def _open_shards(folder: str, vae: Autoencoder, vae_folder: str) -> LatentShards:
    shards = LatentShards(folder)
    if shards.origin is None:
        raise DataError(f"{folder} holds no shards; run duotok.recipes.renderer.latents first")
    if shards.origin.vae_fingerprint != vae.known_as:
        raise CheckpointError(
            f"the latents in {folder} were made by the VAE {shards.origin.vae_fingerprint}, {vae_folder} is "
            f"{vae.known_as}; make the latents again or give that VAE"
        )
    return shards


@torch.no_grad()
def fit_scale(codec: LatentCodec, latents: Tensor, power: float) -> None:
    """Set the codec's mean and weights from latents [batch, latent_dim, frames].

    Weights make deviations 1, times importance ** power: 1 is the error of what the latents stand for, 0 that
    of the latents. The spectral VAE knows how much each tells; all latents of another VAE tell as much.
    """
    flat = latents.transpose(0, 1).flatten(1)
    codec.latent_mean.copy_(flat.mean(dim=1))
    deviation = flat.std(dim=1).clamp_min(1e-3)
    importance = torch.ones_like(deviation)
    if isinstance(codec.vae, SpectralVAE):
        importance = codec.vae.latent_scale * deviation
    weight = importance.pow(power) / deviation
    # So that the features' mean square is 1, whatever the power.
    codec.latent_weight.copy_(weight / (weight * deviation).square().mean().sqrt())


class CodecObjective(nn.Module):
    """Latents -> how far those of their codes are; codebooks of moving averages learn in passing."""

    def __init__(self, codec: LatentCodec, config: CodecLossConfig) -> None:
        super().__init__()
        self.codec, self.config = codec, config
        self.codec.vae.requires_grad_(False)

    def forward(self, latents: Tensor) -> dict[str, Tensor]:
        """latents [batch, latent_dim, frames] -> named losses, as shares of the features' power.

        "error": of what is decoded; "commitment", "codebook": of the levels, see ResidualQuantized.
        """
        codec, levels = self.codec, self.codec.codebooks
        features = codec.to_features(latents)
        kept = torch.full((len(features),), levels, device=features.device)
        if self.training:
            drop = torch.rand(len(features), device=features.device) < self.config.drop_levels
            kept = torch.where(drop, torch.randint_like(kept, 1, levels + 1), kept)
        found = codec.quantizer(codec.enter(features), kept)
        error = (codec.leave(found.vectors) - features).square().mean()
        losses = {"error": error, "commitment": found.commitment, "codebook": found.codebook}
        weights = {"error": 1.0, "commitment": self.config.commitment, "codebook": self.config.codebook}
        return {
            "total": sum((weights[n] * loss for n, loss in losses.items()), error.new_zeros(())),
            **losses,
        }


main = recipe_main("Acoustic codec on latents", Config, build)

if __name__ == "__main__":
    sys.exit(main())
