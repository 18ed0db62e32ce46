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
from torch.nn import functional

from duotok.recipes.command import recipe_main
from duotok.recipes.corpus.manifest import PARTS, Item, read_manifest
from duotok.recipes.renderer.vae_energy import fit_energy_gains
from duotok.recipes.renderer.vae_linear import fit_linear
from duotok.recipes.renderer.vae_objective import VAELossConfig, VAEObjective
from duotok.recipes.renderer.vae_start import fit_from_start
from duotok.recipes.training import Task, TrainConfig
from duotok.renderer.vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which sound is heard, how long, and how varied."""

    manifest: str
    seconds: float = 3.0  # length of an excerpt
    fit_excerpts: int = 600  # for the linear coding
    energy_excerpts: int = 150  # of those, at most, for the energy gains of the finished VAE
    parts: dict[str, float] = field(default_factory=lambda: {"accompaniment": 7.0, "vocal": 1.5, "mix": 1.5})
    lowest_gain_db: float = -12.0
    highest_gain_db: float = 4.0

    def __post_init__(self) -> None:
        if self.seconds < 0.2 or min(self.fit_excerpts, self.energy_excerpts) < 1:
            raise ConfigError("data.seconds must be at least 0.2 and its numbers of excerpts at least 1")
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts or min(self.parts.values()) < 0 or sum(self.parts.values()) <= 0:
            raise ConfigError(f"data.parts must give shares to some of {', '.join(PARTS)}, got {self.parts}")
        if self.lowest_gain_db > self.highest_gain_db:
            raise ConfigError("data.lowest_gain_db must not be above data.highest_gain_db")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: DataConfig
    start: str = ""  # folder of a VAE whose middle and decoder go on; nothing = from scratch
    model: SpectralVAEConfig = field(default_factory=SpectralVAEConfig)
    loss: VAELossConfig = field(default_factory=VAELossConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def draw_excerpt(rng: np.random.Generator, items: Sequence[Item], data: DataConfig) -> Tensor:
    """Return a random excerpt [2, samples]: any part of any song, at any level, sides swapped at random."""
    item = items[int(rng.integers(len(items)))]
    shares = np.array(list(data.parts.values()))
    part = list(data.parts)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    start = float(rng.uniform(0, max(0.0, item.seconds - data.seconds)))
    wave = item.read(part, start_seconds=start, seconds=data.seconds)
    samples = round(data.seconds * SAMPLE_RATE_HZ)
    wave = functional.pad(wave, (0, max(0, samples - wave.shape[1])))[:, :samples]
    wave = wave * 10 ** (float(rng.uniform(data.lowest_gain_db, data.highest_gain_db)) / 20)
    return wave.flip(0) if rng.random() < 0.5 else wave


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
