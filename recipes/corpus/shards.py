"""Items in webdataset's tars, and random items for training: of a manifest's files, or of some tars.

One sample per item: ID.vocal.wav, ID.drums.wav, ID.bass.wav, ID.other.wav, mono in 16 bits, which is what the
tokenizer hears, and ID.json with the manifest line. Of a WAV a window is read without decoding the rest; FLAC
would take a third of the space and several times the processors. Tars lie on this machine or at URLs of
SCHEMES, from where they are fetched into a cache.
"""

import glob
import io
import itertools
import math
import re
import tarfile
import threading
import wave
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import soundfile
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import (
    SPLITS,
    Item,
    item_from_line,
    item_to_line,
    read_manifest,
    refuse_duplicates,
)
from duotok.recipes.workers.pool import Workers, tell_left_out
from duotok.recipes.workers.storage import FileCache, ask, fetch_quietly, is_remote, open_storage
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio
from duotok.tokenizer.common.errors import AudioError, DataError, DuoTokError
from duotok.tokenizer.common.files import whole_file
from duotok.tokenizer.heads import STEMS

SCHEMES = ("file", "http", "https", "s3", "gs", "az", "hf")  # fsspec's; none of them starts a shell
_FORMAT = (1, 2, SAMPLE_RATE_HZ)  # channels, bytes of a sample, samples a second
_MEMBER = re.compile(rf"(.+)\.({'|'.join(STEMS)})\.wav|(.+)\.json")
_END = bytes(2 * tarfile.BLOCKSIZE)  # of a tar


@dataclass(frozen=True, kw_only=True)
class PackedItem(Item):
    """An item inside of a tar; it reads as any other."""

    tar: str
    cache: FileCache | None
    places: dict[str, tuple[int, int]] = field(repr=False)  # file -> its first byte in the tar, and its bytes

    def _read_file(self, name: str, start: float, seconds: float | None, channels: int | None) -> Tensor:
        if name not in self.places:
            raise DataError(f"the tar {self.tar} holds no {name} of item {self.id}; read it by the manifest")
        first, size = self.places[name]
        with _open_tar(self.tar, self.cache) as tar:
            tar.seek(first)
            try:
                with wave.open(tar) as file:
                    is_ours = file.getparams()[:3] == _FORMAT and 2 * file.getnframes() < size
                    file.setpos(min(round(start * SAMPLE_RATE_HZ), file.getnframes()))
                    frames = file.getnframes() if seconds is None else round(seconds * SAMPLE_RATE_HZ)
                    data = np.frombuffer(file.readframes(frames), "<i2")
            except (wave.Error, EOFError, ValueError) as error:
                raise AudioError(
                    f"{name} of item {self.id} in {self.tar} is damaged; pack it again"
                ) from error
        if not is_ours or not len(data):
            raise AudioError(f"{name} of item {self.id} has no samples, 48 kHz and mono, from {start:g} s on")
        sound = torch.from_numpy(np.multiply(data, np.float32(2**-15), dtype=np.float32))
        return sound.expand(channels or 1, -1).contiguous()


def pack_items(
    items: Iterable[Item],
    folder: str | Path,
    *,
    megabytes: int = 500,
    workers: Workers = Workers(),  # noqa: B008
) -> list[Path]:
    """Write the items that no tar of the folder holds yet to new tars SPLIT-NNNNNN.tar.

    A tar appears under its name only when it is whole, so a run that is stopped goes on with the next one.
    Raises DataError at the end where items could not be read.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    items = list(items)
    refuse_duplicates(items, "what is to be packed")
    plans: list[tuple[list[Item], Path]] = []
    for split in SPLITS:
        tars = sorted(folder.glob(f"{split}-[0-9]*.tar"))
        packed = {name for tar in tars for name in packed_ids(tar)}
        names = (folder / f"{split}-{number:06d}.tar" for number in itertools.count())
        free = (name for name in names if name not in tars)
        size = math.inf
        for item in (item for item in items if item.split == split and item.id not in packed):
            item_bytes = len(STEMS) * 2 * item.seconds * item.speed * SAMPLE_RATE_HZ
            size += item_bytes
            if size > megabytes * 1_000_000:
                plans.append(([], next(free)))
                size = item_bytes
            plans[-1][0].append(item)
    results = workers.run(plans, _write_tar) if workers.are_apart else ((p, _write_tar(p)) for p in plans)
    reasons = []
    for (_, path), left_out in results:
        reasons += [f"{path}: {left_out}"] if isinstance(left_out, str) else left_out
    if reasons:
        raise DataError(f"{len(reasons)} items or tars could not be packed: {tell_left_out(reasons)}")
    return [path for _, path in plans]


def packed_ids(tar: str | Path) -> set[str]:
    """Ids of the items in a tar on this machine."""
    return {item.id for item in read_tar(str(tar))}


def read_shards(source: str | Path, cache: FileCache | None = None) -> Iterator[PackedItem]:
    """The items of tars, in order; see find_tars and read_tar."""
    for tar in find_tars(str(source)):
        yield from read_tar(tar, cache)


def find_tars(source: str) -> list[str]:
    """Return the tars that a path or URL names: {000000..000041} for a range, * for all that there are."""
    scheme = re.match(r"([a-z][a-z0-9+.-]+):", source, flags=re.IGNORECASE)
    if scheme is not None and scheme[1].lower() not in SCHEMES:
        raise DataError(f"{source:.200} is not read; give paths of tars, or URLs of {', '.join(SCHEMES)}")
    tars = []
    for each in _expand_ranges(source.removeprefix("file://")):
        if "*" not in each:
            tars.append(each)
        elif is_remote(each):
            storage, place = open_storage(each)
            found = ask(each, lambda storage=storage, place=place: storage.glob(place))
            tars += sorted(storage.unstrip_protocol(tar) for tar in found)
        else:
            tars += sorted(glob.glob(each))
    if not tars:
        raise DataError(f"there are no tars {source:.200}")
    return tars


def _expand_ranges(text: str) -> list[str]:
    found = re.search(r"\{(\d+)\.\.(\d+)\}", text)
    if found is None:
        return [text]
    before, after, digits = text[: found.start()], text[found.end() :], len(found[1])
    numbers = range(int(found[1]), int(found[2]) + 1)
    return [whole for number in numbers for whole in _expand_ranges(f"{before}{number:0{digits}}{after}")]


def read_tar(tar: str, cache: FileCache | None = None) -> list[PackedItem]:
    """Return the items of a tar, without their sound; DataError where it is not there or not whole."""
    for is_fetched_anew in (False, True):
        try:
            with _open_tar(tar, cache) as file:
                return _list_items(tar, file, cache)
        except (OSError, ValueError, tarfile.TarError) as error:
            if cache is None or not is_remote(tar) or is_fetched_anew:
                told = f"{type(error).__name__}: {error!s:.200}"
                raise DataError(
                    f"the tar {tar:.200} is not there or damaged ({told}); delete it and pack again"
                ) from error
            cache.drop(tar)  # what is kept here may have been damaged here
    raise AssertionError


def _open_tar(tar: str, cache: FileCache | None) -> BinaryIO:
    if not is_remote(tar):
        return Path(tar).open("rb")
    if cache is None:
        raise DataError(f"{tar:.200} is read with a cache only")
    return cache.open(tar)


def _list_items(tar: str, file: BinaryIO, cache: FileCache | None) -> list[PackedItem]:
    lines: dict[str, str] = {}
    places: dict[str, dict[str, tuple[int, int]]] = {}
    end = 0
    with tarfile.open(fileobj=file, mode="r:") as archive:
        for member in archive:
            end = member.offset_data + -(-member.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
            found = _MEMBER.fullmatch(member.name) if member.isfile() else None
            if found is not None and found[3] is not None:
                held = archive.extractfile(member)
                assert held is not None
                lines[found[3]] = held.read().decode("utf-8")
            elif found is not None:
                places.setdefault(found[1], {})[found[2]] = (member.offset_data, member.size)
    # The iteration takes a tar that is cut off between two members for a whole one.
    file.seek(end)
    if file.read(len(_END)) != _END:
        raise tarfile.ReadError("it is cut off")
    root = Path(tar).parent
    items = []
    for name, line in lines.items():
        missing = [each for each in STEMS if each not in places.get(name, {})]
        if missing:
            told = (
                f"{name}.{missing[0]}.wav; it is no shard of items as they are now: delete it and pack again"
            )
            raise DataError(f"{tar} has no {told}")
        item = item_from_line(line, root)
        values = {each.name: getattr(item, each.name) for each in fields(Item)}
        items.append(PackedItem(**values, tar=tar, cache=cache, places=places[name]))
    if not items:
        raise DataError(f"{tar} has no item; it is not a shard of items")
    return items


def _write_tar(plan: tuple[Sequence[Item], Path]) -> list[str]:
    """Write a tar of the items that can be read, if any; return why the others cannot."""
    items, path = plan
    left_out = []
    with whole_file(path) as temporary, tarfile.open(temporary, "w") as tar:
        for item in items:
            try:
                members = {f"{stem}.wav": _to_wav(item, stem) for stem in STEMS}
            except DuoTokError as error:
                left_out.append(f"{item.id}: {error}")
                continue
            members["json"] = item_to_line(item).encode("utf-8")
            for ending, data in members.items():
                entry = tarfile.TarInfo(f"{item.id}.{ending}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    if len(left_out) == len(items):
        path.unlink()
    return left_out


def _to_wav(item: Item, stem: str) -> bytes:
    sound = read_audio(item.path(stem), channels=1)[0] * 32_768
    held = io.BytesIO()
    data = sound.round().clamp(-32_768, 32_767).to(torch.int16).numpy()
    soundfile.write(held, data, SAMPLE_RATE_HZ, subtype="PCM_16", format="WAV")
    return held.getvalue()


class ItemSource(Protocol):
    """Where random items come from."""

    def pick(self, rng: np.random.Generator, *, is_sung: bool) -> Item:
        """Draw an item, one with singing where asked for and if there is any."""
        ...

    def seek(self, seed: int, process: int, step: int) -> None:
        """Go to where a process is at a step; what is drawn there depends on nothing else."""
        ...


def is_sung_item(item: Item) -> bool:
    """Tell whether somebody sings in it: cuts of real songs include instrumental ones."""
    return bool(item.notes or item.lyrics)


def open_items(
    source: str, *, shortest_seconds: float, tars: int, steps_per_tar: int, cache: str | Path, cache_gb: float
) -> ItemSource:
    """Open a JSONL manifest, or tars as find_tars takes them, so many at a time; cache: see FileCache."""
    if source.endswith(".tar") or source.startswith("pipe:"):
        kept = FileCache(Path(cache).expanduser(), round(cache_gb * 1e9))
        return TarItems(
            source, shortest_seconds=shortest_seconds, tars=tars, steps_per_tar=steps_per_tar, cache=kept
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

    def seek(self, seed: int, process: int, step: int) -> None:
        """Do nothing: all items are at hand at every step."""


class TarItems:
    """The items of some tars at a time, of which the oldest makes room for the next after so many steps.

    Each process goes through all tars in an order of its own, and then again in another one.
    """

    def __init__(
        self, source: str, *, shortest_seconds: float, tars: int, steps_per_tar: int, cache: FileCache
    ) -> None:
        self._source, self._shortest, self._cache = source, shortest_seconds, cache
        self._tars, self._at_a_time, self._steps_per_tar = find_tars(source), tars, steps_per_tar
        self._open: dict[str, list[PackedItem]] = {}
        self._place: tuple[int, int, int] | None = None
        self.seek(0, 0, 0)

    def pick(self, rng: np.random.Generator, *, is_sung: bool) -> Item:
        """Draw an item; see ItemSource."""
        return self._items.pick(rng, is_sung=is_sung)

    def seek(self, seed: int, process: int, step: int) -> None:
        """Open the tars of a step; see ItemSource."""
        place = (seed, process, step // self._steps_per_tar)
        if place == self._place:
            return
        wanted, coming = self._tars, ""
        if len(self._tars) > self._at_a_time:
            *wanted, coming = (self._tar_at(*place, number) for number in range(self._at_a_time + 1))
        self._open = {tar: self._open.get(tar) or read_tar(tar, self._cache) for tar in dict.fromkeys(wanted)}
        items = [item for tar in self._open.values() for item in tar if item.seconds >= self._shortest]
        if not items:
            raise DataError(
                f"{self._source:.200} has no item of at least {self._shortest:g} s in {', '.join(self._open)}"
            )
        self._items = ItemList(items)
        if self._place is not None and is_remote(coming):  # a program that only begins may yet fork
            threading.Thread(target=fetch_quietly, args=(self._cache, coming), daemon=True).start()
        self._place = place

    def _tar_at(self, seed: int, process: int, first: int, number: int) -> str:
        """The tar of a place in the endless order of a process."""
        turn, place = divmod(first + number, len(self._tars))
        return self._tars[np.random.default_rng((seed, process, turn)).permutation(len(self._tars))[place]]
