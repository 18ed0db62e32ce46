"""The written lead sheet of an item of the corpus: place in the bar and chord of every frame."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.lm.sheet.columns import unknown_sheet, write_sheet
from duotok.lm.sheet.tracking import places_between
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.token_shards import TokenShards
from duotok.recipes.tokenizer.labelled_chroma import chords_of_blocks
from duotok.tokenizer.common.errors import DataError


class SheetLabels:
    """The written sheets of the items of a manifest; of an item that is not in it nothing is known."""

    def __init__(self, manifest: str | Path, shards: TokenShards) -> None:
        """Raises DataError for a manifest with no item of the shards."""
        wanted = {song.id for song in shards.index.songs}
        self._items = {item.id: item for item in read_manifest(manifest) if item.id in wanted}
        if not self._items:
            raise DataError(f"no item of {manifest} is in {shards.folder}; give the manifest it was made of")
        self._rate_hz = shards.index.frame_rate_hz
        self._known: dict[str, Tensor] = {}

    def cut(self, name: str, start: int, frames: int) -> Tensor:
        """Return the sheet [frames, COLUMNS] of an item from frame `start` on."""
        if name not in self._items:
            return unknown_sheet(frames)
        if name not in self._known:
            self._known[name] = label_frames(self._items[name], self._rate_hz)
        found = self._known[name][start : start + frames]
        return torch.cat([found, unknown_sheet(frames - len(found))])


def label_frames(item: Item, rate_hz: float) -> Tensor:
    """Return the sheet [frames, COLUMNS] of a whole item.

    A frame is UNKNOWN before the first bar line and after the last, and where the chord is neither major nor
    minor.
    """
    frames = round(item.seconds * rate_hz)
    places = places_between(np.asarray(item.downbeats_seconds, dtype=float) * rate_hz, frames)
    chords = chords_of_blocks(item.chords, frames, rate_hz)
    return write_sheet(places, chords)
