"""Lead sheets for the language model's training: the corpus' own, what the reader makes of it, or none."""

import zlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotok.lm.sheet.columns import TRUST, UNKNOWN, unknown_sheet
from duotok.lm.sheet.reader import SheetReader
from duotok.recipes.lm.sheet_labels import SheetLabels
from duotok.recipes.lm.token_shards import TokenShards, TokenSong
from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """Which sheets a band learns to play from; used where the model has a sheet reader."""

    reader: str | None = None  # folder of duotok.recipes.lm.sheet_reader, added to the model
    manifest: str | None = None  # of the same items, with their scores; None: only the reader tells
    # Share of the examples that are shown the corpus' own sheet: it teaches to trust what is written, the
    # reader's teaches how far each level of trust may be wrong.
    written: float = 0.5
    dropout: float = 0.15  # of places and of chords, each by itself
    # Half of the read sheets are of vocals with up to so large a share of strange codes: the reader has
    # learned these songs, and is seldom as unsure of them as of others.
    damage: float = 0.6

    def __post_init__(self) -> None:
        for name in ("written", "dropout", "damage"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"sheets.{name} must be in 0..1, got {getattr(self, name)}")


class SheetSource:
    """Draws the sheets of windows; what the reader says of an item is kept."""

    def __init__(self, shards: TokenShards, config: SheetConfig, reader: SheetReader) -> None:
        """Raises DataError for a manifest with no item of the shards."""
        self._shards, self._config, self._reader = shards, config, reader
        self._written = SheetLabels(config.manifest, shards) if config.manifest is not None else None
        self._read: dict[tuple[str, bool], Tensor] = {}

    def draw(self, rng: np.random.Generator, song: TokenSong, start: int, frames: int) -> Tensor:
        """Return a sheet [frames, COLUMNS] of a song from frame `start` on."""
        is_written = rng.random() < self._config.written
        hidden = rng.random(2) < self._config.dropout
        if self._written is not None and is_written:
            sheet = self._written.cut(song.id, start, frames)
        else:
            sheet = self.read(song, damaged=rng.random() < 0.5)[start : start + frames].clone()
            sheet = torch.cat([sheet, unknown_sheet(frames - len(sheet))])
        for column, trust in TRUST.items():
            if hidden[column]:
                sheet[:, [column, trust]] = UNKNOWN
        return sheet

    def read(self, song: TokenSong, *, damaged: bool = False) -> Tensor:
        """Return what the reader says of a whole item [frames, COLUMNS]; the same at every call."""
        key = (song.id, damaged)
        if key not in self._read:
            codes = self._shards.codes(song)["vocal"].long()
            if damaged:
                codes = self._damage(codes, np.random.default_rng(zlib.crc32(song.id.encode())))
            self._read[key] = self._reader.read(codes[None])[0]
        return self._read[key]

    def _damage(self, codes: Tensor, rng: np.random.Generator) -> Tensor:
        is_hit = torch.from_numpy(rng.random(len(codes)) < rng.uniform(0, self._config.damage))
        strange = torch.from_numpy(rng.integers(self._reader.config.vocal_codes, size=len(codes)))
        return torch.where(is_hit, strange, codes)
