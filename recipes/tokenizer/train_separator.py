"""Train the mask estimator that turns stage 2's mask head into a separator; stage 2 stays frozen.

Run: python -m duotok.recipes.tokenizer.train_separator recipes/tokenizer/train_separator/small.yaml \\
         --out runs/small/separator
"""

import sys
from dataclasses import dataclass, field

import torch

from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.separator import MaskSeparator, SeparationObjective, SeparatorConfig


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe."""

    start_from: str  # tokenizer folder of stage 2, with its mask head
    data: CutConfig
    mixture: dict[str, float] = field(default_factory=lambda: {"mix": 8, "vocal": 1, "instrumental": 1})
    channels: int = SeparatorConfig.channels
    scales: int = SeparatorConfig.scales
    remix_db: float = 6.0  # random gain of each stem, uniform in +- this
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    sampler = CutSampler(config.data)
    tokenizer = DuoTokenizer.from_pretrained(config.start_from)
    if tokenizer.mask_head is None:
        raise CheckpointError(f"{config.start_from} has no mask head; give the tokenizer folder of stage 2")
    sizes = SeparatorConfig(tokenizer=tokenizer.config, channels=config.channels, scales=config.scales)
    separator = MaskSeparator(sizes)
    separator.tokenizer.load_state_dict(tokenizer.state_dict())

    def make_batch(rng):
        kinds = sampler.draw_kinds(rng, config.train.batch_size, config.mixture)
        stems = torch.stack([sampler.cut(rng, kind).stems for kind in kinds])
        gains_db = rng.uniform(-config.remix_db, config.remix_db, stems.shape[:2])
        return {"stems": stems * torch.from_numpy(10 ** (gains_db / 20)).float()[..., None]}

    return Task(SeparationObjective(separator), make_batch, separator.save_pretrained, seek=sampler.seek)


main = recipe_main("Train the separator", Config, build)

if __name__ == "__main__":
    sys.exit(main())
