"""The spectral VAE: fit its linear coding on a corpus, then train the corrections (P 3.4).

Run: python -m duotok.recipes.renderer.vae recipes/renderer/vae/small.yaml --out runs/small/vae --minutes 20
With --set start=FOLDER the middle and the decoder of an earlier VAE go on, and far fewer steps do; where the
numbers of latents are the same too, so do its latents.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.renderer.excerpts import ExcerptConfig, draw_excerpt
from duotok.recipes.renderer.vae_energy import fit_energy_gains
from duotok.recipes.renderer.vae_linear import fit_linear
from duotok.recipes.renderer.vae_objective import VAELossConfig, VAEObjective
from duotok.recipes.renderer.vae_start import fit_from_start
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class DataConfig(ExcerptConfig):
    """Which sound is heard, and how much of it the fits before and after training hear."""

    fit_excerpts: int = 600  # for the linear coding
    energy_excerpts: int = 150  # of those, at most, for the energy gains of the finished VAE

    def __post_init__(self) -> None:
        super().__post_init__()
        if min(self.fit_excerpts, self.energy_excerpts) < 1:
            raise ConfigError("data.fit_excerpts and data.energy_excerpts must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: DataConfig
    start: str = ""  # folder of a VAE whose middle and decoder go on; nothing = from scratch
    model: SpectralVAEConfig = field(default_factory=SpectralVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Fit the linear coding; make the objective and its batches."""
    items = read_manifest(config.data.manifest)
    if not items:
        raise DataError(f"the manifest {config.data.manifest} is empty; make a corpus first")

    def fit_waves(count: int) -> Iterator[Tensor]:
        for number in range(count):
            rng = np.random.default_rng((config.train.seed, number, 1))
            yield draw_excerpt(rng, items, config.data)

    torch.manual_seed(config.train.seed)
    vae = SpectralVAE(config.model)
    if config.start:
        fit_from_start(vae, SpectralVAE.from_pretrained(config.start), fit_waves(config.data.fit_excerpts))
    else:
        fit_linear(vae, fit_waves(config.data.fit_excerpts))
    objective = VAEObjective(vae, config.loss)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        waves = [draw_excerpt(rng, items, config.data) for _ in range(config.train.batch_size)]
        return {"wave": torch.stack(waves)}

    def export(folder: Path) -> None:
        if config.model.energy_gains:
            count = min(config.data.energy_excerpts, config.data.fit_excerpts)
            fit_energy_gains(vae.eval(), fit_waves(count))
        vae.save_pretrained(folder)

    return Task(objective, make_batch, export)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Spectral VAE", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
