"""Stage 1: BEST-RQ pre-training of the encoder (P 3.1).

Run: python -m duotok.recipes.tokenizer.stage1 recipes/tokenizer/stage1/small.yaml --out runs/small/stage1
"""

import sys
from dataclasses import dataclass, field

from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler, mel_statistics
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig
from duotok.tokenizer.objectives import BestRQ


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of stage 1."""

    data: CutConfig
    model: DuoTokenizerConfig = field(default_factory=DuoTokenizerConfig)
    mixture: dict[str, float] = field(default_factory=lambda: {"mix": 2, "vocal": 1, "accompaniment": 1})
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    sampler = CutSampler(config.data)
    tokenizer = DuoTokenizer(config.model)
    mean, deviation = mel_statistics(sampler, tokenizer.log_mel)
    tokenizer.mel_mean.copy_(mean)
    tokenizer.mel_deviation.copy_(deviation)

    def make_batch(rng):
        return {"wave": sampler.draw_mixture(rng, config.train.batch_size, config.mixture)}

    return Task(BestRQ(tokenizer), make_batch, tokenizer.save_pretrained, seek=sampler.seek)


main = recipe_main("Stage 1: BEST-RQ pre-training", Config, build)

if __name__ == "__main__":
    sys.exit(main())
