"""Stage 2: mel, chroma, lyrics and stem masks through a bottleneck with replacement noise (P 3.2).

Run: python -m duotok.recipes.tokenizer.train_text_model --manifest data/popband/train.jsonl \\
         --out runs/small/text.model
     python -m duotok.recipes.tokenizer.stage2 recipes/tokenizer/stage2/small.yaml --out runs/small/stage2
"""

import sys
from dataclasses import dataclass, field

import torch

from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler, collate_cuts
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.objectives import LossWeights, MultiTaskObjective
from duotok.tokenizer.text import read_vocabulary


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of stage 2."""

    start_from: str  # tokenizer folder of stage 1
    data: CutConfig
    # Batches by kind of cut, 4:1:1:1 in the paper (P C.3).
    mixture: dict[str, float] = field(
        default_factory=lambda: {"mix": 4, "vocal": 1, "accompaniment": 1, "instrumental": 1}
    )
    noise_probability: float = 0.2  # of a frame to be replaced
    # A sentencepiece .model, or a Hugging Face tokenizer (the paper: bert-base-multilingual-cased); none: no
    # lyric head.
    text: str | None = None
    text_run_seconds: float = 2.0  # lyrics are supervised in runs of lines up to about as long as this
    weights: LossWeights = field(default_factory=LossWeights)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not 0 <= self.noise_probability <= 1:
            raise ConfigError(f"noise_probability must be in 0..1, got {self.noise_probability}")


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    sampler = CutSampler(config.data)
    text = None if config.text is None else read_vocabulary(config.text)
    tokenizer = DuoTokenizer.from_pretrained(config.start_from)
    tokenizer = tokenizer.with_heads(text=text, masks=config.weights.masks > 0)
    objective = MultiTaskObjective(tokenizer, config.weights, config.noise_probability)

    def make_batch(rng):
        kinds = sampler.draw_kinds(rng, config.train.batch_size, config.mixture)
        cuts = [sampler.cut(rng, kind) for kind in kinds]
        labels = collate_cuts(cuts, text, config.text_run_seconds, rng)
        return {"stems": torch.stack([cut.stems for cut in cuts]), **labels}

    return Task(objective, make_batch, tokenizer.save_pretrained, seek=sampler.seek)


main = recipe_main("Stage 2: multi-task training", Config, build)

if __name__ == "__main__":
    sys.exit(main())
