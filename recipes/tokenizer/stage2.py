"""Stage 2: mel and chroma through a bottleneck with Gaussian replacement noise (P 3.2).

Run: python -m duotok.recipes.tokenizer.stage2 recipes/tokenizer/stage2/small.yaml --out runs/small/stage2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from duotok.recipes.command import recipe_main
from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.recipes.training import Task, TrainConfig
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.objectives import LossWeights, MultiTaskObjective


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of stage 2."""

    start_from: str  # tokenizer folder of stage 1
    data: CutConfig
    mixture: dict[str, float] = field(
        default_factory=lambda: {"mix": 4, "vocal": 1, "accompaniment": 1, "instrumental": 1}
    )
    noise_probability: float = 0.2  # of a frame to be replaced
    weights: LossWeights = field(default_factory=LossWeights)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    sampler = CutSampler(config.data)
    tokenizer = DuoTokenizer.from_pretrained(config.start_from)
    objective = MultiTaskObjective(tokenizer, config.weights, config.noise_probability)

    def make_batch(rng):
        return {"wave": sampler.draw_mixture(rng, config.train.batch_size, config.mixture)}

    return Task(objective, make_batch, tokenizer.save_pretrained)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Stage 2: multi-task training", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
