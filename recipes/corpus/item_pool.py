"""Random items of a corpus: of a manifest's files, or of webdataset tars that stream through a pool."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from duotok.recipes.corpus.audio_shards import StreamedItem, read_shards
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.tokenizer.common.errors import DataError

SHUFFLED_TARS = 100


class ItemSource(Protocol):
    """Where random items come from."""

    def pick(self, rng: np.random.Generator, *, is_sung: bool) -> Item:
        """Draw an item, one with singing where asked for and if there is any."""
        ...


def is_sung_item(item: Item) -> bool:
    """Tell whether somebody sings in it: cuts of real songs include instrumental ones."""
    return bool(item.notes or item.lyrics)


def open_items(
    source: str, *, shortest_seconds: float, pool_items: int, cuts_per_item: int, seed: int = 0
) -> ItemSource:
    """Open a JSONL manifest, or tars: a path or a URL, {000..041} for a range."""
    if source.endswith(".tar") or source.startswith("pipe:"):
        return ItemPool(
            lambda epoch: read_shards(source, shuffle=SHUFFLED_TARS, seed=seed + epoch, by_node=True),
            name=source,
            shortest_seconds=shortest_seconds,
            size=pool_items,
            cuts_per_item=cuts_per_item,
        )
    items = [item for item in read_manifest(Path(source)) if item.seconds >= shortest_seconds]
    if not items:
        raise DataError(f"{source} has no item of at least {shortest_seconds:g} s")
    return ItemList(items)


class ItemList:
    """The items of a manifest, whose sound lies in files."""

    def __init__(self, items: Sequence[Item]) -> None:
        self._items = list(items)
        self._sung = [item for item in self._items if is_sung_item(item)] or self._items

    def pick(self, rng: np.random.Generator, *, is_sung: bool) -> Item:
        """Draw an item; see ItemSource."""
        items = self._sung if is_sung else self._items
        return items[rng.integers(len(items))]


class ItemPool:
    """Some items of endless shards in memory; after every few draws the next one takes a random place.

    A run that is resumed goes on with the shards from their beginning, unlike one from a manifest, whose
    draws depend on nothing but the step.
    """

    def __init__(
        self,
        open_epoch: Callable[[int], Iterator[StreamedItem]],
        *,
        name: str,
        shortest_seconds: float,
        size: int,
        cuts_per_item: int,
    ) -> None:
        self._open_epoch, self._name, self._shortest = open_epoch, name, shortest_seconds
        self._cuts_per_item, self._draws = cuts_per_item, 0
        self._stream = self._endless()
        first = next(self._stream)
        self._items = [first]
        for item in itertools.islice(self._stream, size - 1):
            if item.id == first.id:  # the shards hold fewer items than the pool could
                break
            self._items.append(item)

    def pick(self, rng: np.random.Generator, *, is_sung: bool) -> Item:
        """Draw an item; see ItemSource."""
        items = [item for item in self._items if is_sung_item(item)] if is_sung else self._items
        items = items or self._items
        item = items[rng.integers(len(items))]
        self._draws += 1
        if self._draws % self._cuts_per_item == 0:
            self._items[rng.integers(len(self._items))] = next(self._stream)
        return item

    def _endless(self) -> Iterator[StreamedItem]:
        for epoch in itertools.count():
            is_empty = True
            for item in self._open_epoch(epoch):
                if item.seconds >= self._shortest:
                    is_empty = False
                    yield item
            if is_empty:
                raise DataError(
                    f"{self._name} has no item of at least {self._shortest:g} s for this process; "
                    f"give at least one tar per process"
                )
