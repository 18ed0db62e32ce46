"""Items as webdataset tars, and random items for training: of a manifest's files, or of tars that stream.

One sample per item: ID.vocal.flac, ID.drums.flac, ID.bass.flac, ID.other.flac, ID.mix.flac (or .wav, as the
corpus has them) and ID.json with the manifest line. Tars are read from files, http(s):// and gs://;
webdataset's "pipe:" is refused, for a recipe of somebody else's would run any command by it.
"""

import glob
import importlib.util
import io
import itertools
import json
import re
import tarfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import SPLITS, Item, item_from_line, item_to_line, read_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError
from duotok.tokenizer.common.files import whole_file
from duotok.tokenizer.heads import STEMS

FILES = (*STEMS, "mix")
SCHEMES = ("file", "http", "https", "gs")  # none of them starts a shell
SHUFFLED_TARS = 100


@dataclass(frozen=True, kw_only=True)
class StreamedItem(Item):
    """An item whose sound is in memory; it reads as any other."""

    sound: dict[str, bytes] = field(repr=False)  # vocal, drums, bass, other, mix -> a sound file

    def _read_file(self, name: str, start: float, seconds: float | None, channels: int | None) -> Tensor:
        frames = -1 if seconds is None else round(seconds * SAMPLE_RATE_HZ)
        try:
            with soundfile.SoundFile(io.BytesIO(self.sound[name])) as file:
                rate_hz = file.samplerate
                file.seek(min(round(start * SAMPLE_RATE_HZ), file.frames))
                data = file.read(frames, dtype="float32", always_2d=True)
        except (soundfile.SoundFileError, RuntimeError) as error:
            raise AudioError(f"{name} of item {self.id} in {self.root} is damaged; pack it again") from error
        if rate_hz != SAMPLE_RATE_HZ or not len(data):
            raise AudioError(f"{name} of item {self.id} has no samples at 48 kHz from {start:g} s on")
        if channels is not None and data.shape[1] != channels:
            data = np.repeat(data.mean(axis=1, keepdims=True), channels, axis=1)
        return torch.from_numpy(np.ascontiguousarray(data.T))


def check_webdataset() -> None:
    """Raise ConfigError when the package is missing."""
    if importlib.util.find_spec("webdataset") is None:
        raise ConfigError("audio shards need the package webdataset: pip install webdataset")


def pack_items(items: Iterable[Item], folder: str | Path, *, megabytes: int = 500) -> list[Path]:
    """Write the items that no tar of the folder holds yet to new tars SPLIT-NNNNNN.tar.

    A tar appears under its name only when it is whole, so a run that is stopped goes on with the next one.
    """
    check_webdataset()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = list(items)
    written = []
    for split in SPLITS:
        tars = sorted(folder.glob(f"{split}-[0-9]*.tar"))
        packed = {name for tar in tars for name in packed_ids(tar)}
        number = max((int(tar.stem.rsplit("-", 1)[1]) for tar in tars), default=-1) + 1
        batch: list[Item] = []
        size = 0
        for item in (item for item in items if item.split == split and item.id not in packed):
            item_bytes = sum(item.path(name).stat().st_size for name in FILES)
            if batch and size + item_bytes > megabytes * 1_000_000:
                written.append(_write_tar(batch, folder / f"{split}-{number:06d}.tar"))
                batch, size, number = [], 0, number + 1
            batch.append(item)
            size += item_bytes
        if batch:
            written.append(_write_tar(batch, folder / f"{split}-{number:06d}.tar"))
    return written


def packed_ids(tar: str | Path) -> set[str]:
    """Ids of the items in a tar on this machine."""
    try:
        with tarfile.open(tar) as file:
            return {name.removesuffix(".json") for name in file.getnames() if name.endswith(".json")}
    except (OSError, tarfile.TarError) as error:
        raise DataError(f"{tar} is damaged; delete it and pack again") from error


def read_shards(
    urls: str | Path | Sequence[str | Path], *, shuffle: int = 0, seed: int = 0, by_node: bool = False
) -> Iterator[StreamedItem]:
    """Stream the items of tars: paths (* for all that there are) or URLs, one or many, {000000..000041}.

    shuffle: tars in the shuffle buffer, 0 = in order. Inside a DataLoader every worker reads its own tars;
    by_node: with torch.distributed also every process. Raises DataError for a missing or damaged tar, and for
    a URL of another scheme than SCHEMES.
    """
    check_webdataset()
    from webdataset.compat import WebDataset
    from webdataset.shardlists import expand_urls, single_node_only, split_by_node, split_by_worker

    names = [str(urls)] if isinstance(urls, (str, Path)) else [str(url) for url in urls]
    tars = [each for name in names for each in (sorted(glob.glob(name)) or expand_urls(name))]
    for tar in tars:
        scheme = re.match(r"([a-z][a-z0-9+.-]+):", tar, flags=re.IGNORECASE)
        if scheme is not None and scheme[1].lower() not in SCHEMES:
            raise DataError(f"{tar:.200} is not read; give paths of tars, or URLs of {', '.join(SCHEMES)}")
    dataset = WebDataset(
        tars,
        shardshuffle=shuffle or False,
        seed=seed,
        nodesplitter=split_by_node if by_node else single_node_only,
        workersplitter=split_by_worker,
        empty_check=False,
    )
    try:
        for sample in dataset:
            yield _item(sample)
    except (OSError, EOFError, ValueError, tarfile.TarError) as error:
        raise DataError(f"cannot read the audio shards {', '.join(names)[:200]}: {error!r:.200}") from error


def _item(sample: dict[str, Any]) -> StreamedItem:
    url = str(sample.get("__url__", ""))
    if "json" not in sample:
        raise DataError(f"{url}: {sample.get('__key__')} has no .json; it is not a shard of items")
    item = item_from_line(sample["json"].decode("utf-8"), Path(url).parent)
    sound = {}
    for name in FILES:
        found = [key for key in sample if key.startswith(f"{name}.")]
        if not found:
            raise DataError(f"{url}: {item.id} has no {name}; it is not a shard of items")
        sound[name] = sample[found[0]]
    values = {name: getattr(item, name) for name in asdict(item)}
    return StreamedItem(**values, sound=sound)


def _write_tar(items: Sequence[Item], path: Path) -> Path:
    from webdataset.writer import TarWriter

    with whole_file(path) as temporary, TarWriter(str(temporary), encoder=False, mtime=0.0) as tar:
        for item in items:
            sample: dict[str, Any] = {"__key__": item.id}
            for name in FILES:
                file = item.path(name)
                sample[f"{name}{file.suffix.lower()}"] = file.read_bytes()
            values = json.loads(item_to_line(item))
            sample["json"] = json.dumps(values, ensure_ascii=False).encode("utf-8")
            tar.write(sample)
    return path


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
    """Open a JSONL manifest, or tars: a path (with * all that fit) or a URL, {000..041} for a range."""
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
