"""What the written score says of every frame of an item: its place in the bar and its chord.

Only a corpus with scores can say so; frames of which nothing is known are marked, and cost nothing.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.lm.score_reader import BAR_PLACES, UNKNOWN
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.token_shards import TokenShards
from duotok.recipes.music.labelled_chroma import chords_of_blocks
from duotok.tokenizer.common.errors import DataError


class ScoreLabels:
    """Labels of the items of a manifest; an item that is not in it has none."""

    def __init__(self, manifest: str | Path, shards: TokenShards) -> None:
        """Raises DataError for a manifest with no item of the shards."""
        wanted = {song.id for song in shards.index.songs}
        self._items = {item.id: item for item in read_manifest(manifest) if item.id in wanted}
        if not self._items:
            raise DataError(f"no item of {manifest} is in {shards.folder}; give the manifest it was made of")
        self._rate_hz = shards.index.frame_rate_hz
        self._known: dict[str, dict[str, Tensor]] = {}

    def cut(self, name: str, start: int, frames: int) -> dict[str, Tensor]:
        """Return {"bar_place", "chord"}, each [frames] int64, of an item from frame `start` on."""
        if name not in self._items:
            return {label: torch.full((frames,), UNKNOWN) for label in ("bar_place", "chord")}
        if name not in self._known:
            self._known[name] = label_frames(self._items[name], self._rate_hz)
        found = {}
        for label, values in self._known[name].items():
            cut = values[start : start + frames]
            found[label] = torch.nn.functional.pad(cut, (0, frames - len(cut)), value=UNKNOWN)
        return found


def label_frames(item: Item, rate_hz: float) -> dict[str, Tensor]:
    """Return {"bar_place", "chord"}, each [frames] int64, of a whole item.

    A place is one of BAR_PLACES parts between two bar lines, a chord as the corpus writes it by its triad
    (0-11 major, 12-23 minor, 24 none); UNKNOWN before the first bar line, after the last, and where the chord
    is neither major nor minor.
    """
    middles = (np.arange(round(item.seconds * rate_hz)) + 0.5) / rate_hz
    chords = chords_of_blocks(item.chords, len(middles), rate_hz)
    places = np.full(len(middles), UNKNOWN)
    lines = np.asarray(item.downbeats_seconds, dtype=float)
    if len(lines) > 1:
        turns = np.interp(middles, lines, np.arange(len(lines)))  # bars since the first bar line
        inside = (middles >= lines[0]) & (middles < lines[-1])
        places[inside] = (turns[inside] % 1 * BAR_PLACES).astype(int).clip(0, BAR_PLACES - 1)
    return {"bar_place": torch.from_numpy(places), "chord": torch.from_numpy(chords)}
