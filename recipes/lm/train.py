"""Train the dual-track language model on token shards (P 5.2, B.1).

Run: python -m duotok.recipes.lm.train recipes/lm/small.yaml --out runs/small/lm
Many GPUs: accelerate launch --multi_gpu -m duotok.recipes.lm.train recipes/lm/base.yaml --out runs/base/lm
"""

import copy
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.recipes.lm.data import DataConfig
from duotok.recipes.lm.sheets import SheetConfig
from duotok.recipes.lm.validation import ValidationConfig
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.lm.token_shards import TokenShards


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. Codebook sizes and code_dim of the model are the tokenizer's."""

    tokenizer: str  # folder of the tokenizer that made the tokens
    data: DataConfig
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    start_from: str | None = None  # a trained language model to go on from, instead of a new one
    prompt_weight: float = 0.0  # weight of predicting the target from the prompt alone; see LMObjective
    sheets: SheetConfig = field(default_factory=SheetConfig)
    model: DualTrackLMConfig = field(default_factory=DualTrackLMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.prompt_weight < 0:
            raise ConfigError("prompt_weight must not be negative")


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    import torch

    from duotok.lm.dual_track.objective import LMObjective
    from duotok.recipes.lm.data import WindowSource
    from duotok.recipes.lm.sheets import SheetSource
    from duotok.recipes.lm.token_shards import TokenShards
    from duotok.recipes.lm.validation import make_validation

    shards = TokenShards(config.data.tokens)
    torch.manual_seed(config.train.seed)
    lm = build_model(config, shards)
    sheets = None
    if lm.sheet_reader is not None:
        # A copy, because DeepSpeed may scatter the model's own one over processes.
        sheets = SheetSource(shards, config.sheets, copy.deepcopy(lm.sheet_reader))
    source = WindowSource(shards, config.data, lm, config.train.batch_size, sheets)
    objective = LMObjective(lm, config.prompt_weight)
    return Task(
        objective=objective,
        make_batch=source.make_batch,
        export=lm.save_pretrained,
        validate=make_validation(lm, shards, config.data, config.validation),
        # The codes of both tracks; a window counts once, without its prompt.
        count_units=lambda batch: batch["target_vocal"].numel() + batch["target_accompaniment"].numel(),
        count_flops=lambda batch: batch_flops(lm.config, batch, config.prompt_weight),
    )


def batch_flops(config: DualTrackLMConfig, batch: "dict[str, Tensor]", prompt_weight: float = 0.0) -> float:
    """Return the floating-point operations of a forward and backward pass on arguments of an LMObjective.

    Each weight of a matrix takes 6 a step: twice 2 backward. Attention is counted over all pairs of steps,
    and what gradient checkpointing computes twice counts once, as PaLM's utilization has it (arXiv 2204.02311,
    appendix B). Look-ups, norms and softmax are left out.
    """
    examples, frames = batch["target_vocal"].shape
    steps, width = batch["segment"].shape[1], config.hidden_dim
    keys = config.key_value_heads * width // config.heads
    layer = 2 * width * (width + keys + steps) + 3 * width * config.feed_forward_dim
    trunk = config.layers * layer + 2 * config.embedding_dim * width
    anchors = 2 * config.code_dim * config.embedding_dim
    heads = 0.0
    for track in TRACKS:
        size = getattr(config, f"{track}_codes")
        in_prompt = steps > frames and prompt_weight > 0 and bool(batch[f"weight_{track}"].any())
        # 4 a step where the other side, the tokenizer's code vectors, has no gradient.
        head = 6 * width * (config.code_dim + size) + 4 * config.code_dim * size
        heads += head * (2 if in_prompt else 1)
    return float(examples * (steps * (6 * trunk + 4 * anchors) + frames * heads))


def build_model(config: Config, shards: "TokenShards") -> DualTrackLM:
    """Return a new model for the tokenizer, or the one to start from, checked against the tokens."""
    from duotok.lm.sheet.reader import SheetReader
    from duotok.tokenizer.model import DuoTokenizer

    if config.start_from is not None:
        lm = DualTrackLM.from_pretrained(config.start_from)
    else:
        lm = DualTrackLM.for_tokenizer(DuoTokenizer.from_pretrained(config.tokenizer), config.model)
    if str(lm.tokenizer_fingerprint) != shards.index.tokenizer_fingerprint:
        raise CheckpointError(
            f"the tokens in {shards.folder} were made by the tokenizer {shards.index.tokenizer_fingerprint}, "
            f"the model is for {lm.tokenizer_fingerprint}; make the tokens again"
        )
    if config.sheets.reader is not None:
        lm.add_sheet_reader(SheetReader.from_pretrained(config.sheets.reader))
    return lm


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(
        argv, description="Train the dual-track language model", config_class=Config, build=build
    )


if __name__ == "__main__":
    sys.exit(main())
