"""The test excerpts that every part of the evaluation measures on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Excerpt:
    """A stretch of one test item."""

    item: Item
    start_seconds: float
    seconds: float

    @property
    def samples(self) -> int:
        """Length at 48 kHz."""
        return round(self.seconds * SAMPLE_RATE_HZ)

    def read(self, part: str, *, channels: int | None = 2) -> Tensor:
        """Audio of a part (vocal, accompaniment, ...): [channels, samples], silence after the song's end."""
        wave = self.item.read(part, start_seconds=self.start_seconds, seconds=self.seconds, channels=channels)
        wave = wave[:, : self.samples]
        return torch.nn.functional.pad(wave, (0, self.samples - wave.shape[-1]))

    @property
    def beats_seconds(self) -> np.ndarray:
        """The song's beats from the excerpt's start on, in seconds [beats]."""
        beats = np.asarray(self.item.beats_seconds, dtype=float) - self.start_seconds
        return beats[(beats >= 0) & (beats <= self.seconds)]


def read_test_items(corpus: Path) -> list[Item]:
    """All items of corpus/test.jsonl, which must hold the test split and nothing else."""
    return read_split(corpus, "test")


def read_split(corpus: Path, split: str) -> list[Item]:
    """All items of corpus/<split>.jsonl, which must hold that split and nothing else."""
    path = corpus / f"{split}.jsonl"
    items = read_manifest(path)
    foreign = [item.id for item in items if item.split != split]
    if foreign:
        raise DataError(f"{path} holds {foreign[0]}, which is not of the {split} split")
    if not items:
        raise DataError(f"{path} has no items; make them by duotok.recipes.corpus.popband")
    return sorted(items, key=lambda item: item.id)


def choose_excerpts(items: Sequence[Item], *, count: int, seconds: float, seed: int) -> list[Excerpt]:
    """At most `count` excerpts, one per item, of as many different songs as possible, chosen by seed.

    Each is the stretch (on a grid of 1 s) of its item in which most is sung, for without singing there is
    nothing to fit. Shorter items are left out.
    """
    rng = np.random.default_rng(seed)
    long_enough = [item for item in items if item.seconds >= seconds]
    if not long_enough:
        longest = max(items, key=lambda item: item.seconds)
        raise DataError(
            f"no test item has {seconds:g} s; the longest has {longest.seconds:g} s: lower --seconds"
        )
    seen: dict[str, int] = {}
    ranked = []
    for index in rng.permutation(len(long_enough)):
        item = long_enough[index]
        ranked.append((seen.get(item.song, 0), item))
        seen[item.song] = seen.get(item.song, 0) + 1
    ranked.sort(key=lambda pair: pair[0])  # stable: first one item of each song, then second ones
    return [
        Excerpt(item=item, start_seconds=_most_sung_start(item, seconds), seconds=seconds)
        for _, item in ranked[:count]
    ]


def _most_sung_start(item: Item, seconds: float) -> float:
    starts = np.arange(0.0, item.seconds - seconds + 1e-6, 1.0)
    notes = np.array([(start, end) for start, end, *_ in item.notes]).reshape(-1, 2)
    overlap = np.minimum(notes[None, :, 1], starts[:, None] + seconds) - np.maximum(
        notes[None, :, 0], starts[:, None]
    )
    return float(starts[np.clip(overlap, 0, None).sum(axis=1).argmax()])
