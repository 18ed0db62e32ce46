"""The waveform autoencoder of the paper's size: Oobleck under ear-VAE's losses and an adversary (P 3.4).

Run: python -m duotok.recipes.renderer.waveform_vae recipes/renderer/waveform_vae/base.yaml \\
    --out runs/base/vae
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.renderer.excerpts import ExcerptConfig, draw_excerpt
from duotok.recipes.renderer.waveform_losses import WaveformLossConfig
from duotok.recipes.renderer.waveform_objective import AdversaryConfig, WaveformObjective
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.renderer.vae_oobleck import OobleckVAE, OobleckVAEConfig
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    data: ExcerptConfig
    model: OobleckVAEConfig = field(default_factory=OobleckVAEConfig)
    loss: WaveformLossConfig = field(default_factory=WaveformLossConfig)
    adversary: AdversaryConfig = field(default_factory=AdversaryConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.model.sample_rate_hz != SAMPLE_RATE_HZ:
            raise ConfigError(
                f"model.sample_rate_hz must be the corpus's {SAMPLE_RATE_HZ}, got {self.model.sample_rate_hz}"
            )


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    items = read_manifest(config.data.manifest)
    if not items:
        raise DataError(f"the manifest {config.data.manifest} is empty; make a corpus first")
    torch.manual_seed(config.train.seed)
    vae = OobleckVAE(config.model)
    samples = round(config.data.seconds * SAMPLE_RATE_HZ) // vae.hop_samples * vae.hop_samples
    largest = max([*config.loss.fft_sizes, *config.adversary.discriminators.fft_sizes])
    if samples < largest:
        raise ConfigError(
            f"data.seconds={config.data.seconds} gives {samples} samples in whole hops, the largest of the "
            f"fft_sizes is {largest}; raise data.seconds"
        )

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        waves = [draw_excerpt(rng, items, config.data)[:, :samples] for _ in range(config.train.batch_size)]
        return {"wave": torch.stack(waves)}

    objective = WaveformObjective(vae, config.loss, config.adversary)
    return Task(objective, make_batch, vae.save_pretrained, takes_step=True)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Waveform autoencoder", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
