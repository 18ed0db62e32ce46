"""Train the sheet reader: bars and chords from the codes of a vocal, by the written scores of a corpus.

Run: python -m duotok.recipes.lm.sheet_reader recipes/lm/sheet_reader/small.yaml --out runs/small/sheet
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from duotok.lm.sheet.reader import SheetReaderConfig
from duotok.recipes.lm.sheet_windows import SheetDataConfig, SheetObjective, SheetWindows
from duotok.recipes.training.command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import DataError

_VALIDATION_ITEMS = 40


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. What the model must know of the tokenizer is taken from it."""

    tokenizer: str  # folder of the tokenizer that made the tokens
    data: SheetDataConfig
    start_from: str | None = None  # a trained reader to go on from, instead of a new one
    model: SheetReaderConfig = field(default_factory=SheetReaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    import torch

    from duotok.lm.sheet.reader import SheetReader
    from duotok.recipes.lm.sheet_agreement import measure_agreement
    from duotok.recipes.lm.sheet_labels import SheetLabels
    from duotok.recipes.lm.token_shards import TokenShards, split_songs
    from duotok.recipes.lm.transplant import check_tokens
    from duotok.tokenizer.model import DuoTokenizer

    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = TokenShards(config.data.tokens)
    check_tokens(shards, str(tokenizer.fingerprint))
    torch.manual_seed(config.train.seed)
    if config.start_from is None:
        reader = SheetReader.for_tokenizer(tokenizer, config.model)
    else:
        reader = SheetReader.from_pretrained(config.start_from)
        if reader.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(f"the reader {config.start_from} is for another tokenizer; begin a new one")
    trained, held_out = split_songs(shards.index.songs, config.data.hold_out)
    labels = SheetLabels(config.data.manifest, shards)
    source = SheetWindows(shards, labels, trained, config.data, config.train.batch_size, reader.pad)

    def validate() -> dict[str, float]:
        songs = ((shards.codes(song)["vocal"], labels.cut(song.id, 0, song.frames)) for song in held_out)
        return measure_agreement(reader, itertools.islice(songs, _VALIDATION_ITEMS))

    return Task(
        objective=SheetObjective(reader),
        make_batch=source.make_batch,
        export=reader.save_pretrained,
        validate=validate if held_out else None,
        count_units=lambda batch: batch["codes"].numel(),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the recipe."""
    return recipe_main(argv, description="Train the sheet reader", config_class=Config, build=build)


if __name__ == "__main__":
    sys.exit(main())
