"""Songs with known chords and key as chroma blocks: what the harmony reader learns from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.token_shards import TokenShards
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import TRACKS, DuoTokenizer, ReadOut
from duotok.tokenizer.music.chroma import (
    BLOCK_RATE_HZ,
    CHROMA_RATE_HZ,
    at_chroma_rate,
    average_blocks,
    estimate_activity,
)
from duotok.tokenizer.music.harmony import surroundings
from duotok.tokenizer.music.labels import NO_CHORD, parse_chord, parse_root

UNKNOWN_CHORD = -1  # neither major nor minor nor silence: sus, dim, aug


@dataclass(frozen=True, kw_only=True)
class LabelledChromaConfig:
    """Where the songs come from."""

    manifest: str  # training manifest with chords and keys
    tokenizer: str  # tokenizer folder
    tokens: str  # shards that this tokenizer made of the manifest (duotok.recipes.lm.tokenize)
    items: int = 400  # at most, the first of the shards
    heard_every: int = 4  # every so many items are also learned from by the true chroma of their audio

    def __post_init__(self) -> None:
        for name in ("items", "heard_every"):
            if getattr(self, name) < 1:
                raise ConfigError(f"data.{name} must be at least 1, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class ChromaSong:
    """The chroma of both tracks of one item and what is known about it."""

    blocks: dict[str, Tensor]  # of each track [blocks, 12]
    sounding: dict[str, Tensor]  # of each track [blocks] bool
    chords: Tensor  # [blocks] int64: 0-11 major, 12-23 minor, 24 no chord, -1 unknown
    key: int  # 0-11 major, 12-23 minor


def read_songs(config: LabelledChromaConfig) -> list[ChromaSong]:
    """The chroma of every labelled item of the shards, read out of codes and, of some, from the audio too."""
    items = {item.id: item for item in read_manifest(config.manifest)}
    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = TokenShards(config.tokens)
    if shards.index.tokenizer_fingerprint != tokenizer.fingerprint:
        raise DataError(
            f"{config.tokens} was made by another tokenizer than {config.tokenizer}; make it anew"
        )
    labelled = [song for song in shards.index.songs if song.id in items and is_labelled(items[song.id])]
    if not labelled:
        raise DataError(f"no item of {config.manifest} that has chords and a key is in {config.tokens}")
    songs = []
    for number, song in enumerate(tqdm(labelled[: config.items], desc="read chroma", disable=None)):
        item = items[song.id]
        codes = shards.codes(song)
        told = {track: tokenizer.read_out(codes[track][None], track) for track in TRACKS}
        songs.append(_label(item, told))
        if number % config.heard_every == 0:
            songs.append(_label(item, {track: tokenizer.targets(item.read(track)[None]) for track in TRACKS}))
    return songs


def is_labelled(item: Item) -> bool:
    """Whether the chords and the key of an item are known."""
    return bool(item.chords) and bool(item.key)


def triad_of(label: str) -> int:
    """Chord class of a Harte label by the MIREX majmin rule: 0-11 major, 12-23 minor, 24 none, -1 neither."""
    chord = parse_chord(label)
    if chord is None:
        return NO_CHORD
    root, intervals, _ = chord
    triads: dict[tuple[int, ...], int] = {(0, 4, 7): root, (0, 3, 7): 12 + root}
    return triads.get(intervals[:3], UNKNOWN_CHORD)


def key_of(label: str) -> int:
    """Key class of a label such as "Eb:min": 0-11 major, 12-23 minor."""
    root, _, mode = label.partition(":")
    return parse_root(root) + 12 * (mode == "min")


def chords_of_blocks(
    chords: list[tuple[float, float, str]], count: int, rate_hz: float = BLOCK_RATE_HZ
) -> np.ndarray:
    """Chord class [count] of each block, or of each frame of another rate, by what sounds in its middle."""
    middles = (np.arange(count) + 0.5) / rate_hz
    classes = np.full(count, UNKNOWN_CHORD)
    for start, end, label in chords:
        classes[(middles >= start) & (middles < end)] = triad_of(label)
    return classes


class BlockSampler:
    """Draws blocks of accompaniments with what is around them.

    One in eight is made up (see `make_up_chords`), so that clean chroma, silence and noise are known as well,
    and each has another contrast, so that a tokenizer with a sharper or duller chroma can be read, too.
    """

    def __init__(self, songs: Sequence[ChromaSong]) -> None:
        known = [song.chords != UNKNOWN_CHORD for song in songs]
        self.around = torch.cat(
            [surroundings(song.blocks["accompaniment"])[k] for song, k in zip(songs, known, strict=True)]
        )
        self.chords = torch.cat([song.chords[k] for song, k in zip(songs, known, strict=True)])

    def draw(self, rng: np.random.Generator, count: int) -> dict[str, Tensor]:
        """A batch: around [count, stretches, 12], chords [count]."""
        made, made_chords = make_up_chords(rng, count // 8)
        chosen = torch.from_numpy(rng.integers(len(self.chords), size=count - len(made)))
        around = torch.cat([self.around[chosen], surroundings(made)])
        contrast = torch.from_numpy(rng.uniform(0.7, 1.5, size=(count, 1, 1))).float()
        return {"around": around**contrast, "chords": torch.cat([self.chords[chosen], made_chords])}


def make_up_chords(rng: np.random.Generator, block_count: int) -> tuple[Tensor, Tensor]:
    """Chords of 0.5 to 4 s as clean triads under noise, and stretches of flat chroma or none without one."""
    blocks, chords = np.zeros((block_count, 12)), np.full(block_count, NO_CHORD)
    for start, end in _stretches(rng, block_count):
        kind = int(rng.integers(-6, 24))
        floor = rng.uniform(0.0, 0.6)
        if kind >= 0:
            pitches = (kind % 12 + np.array((0, 3 if kind >= 12 else 4, 7))) % 12
            blocks[start:end] = floor
            blocks[start:end, pitches] = rng.uniform(max(0.6, floor + 0.2), 1.0, size=3)
            chords[start:end] = kind
        elif kind >= -3:
            blocks[start:end] = floor
        blocks[start:end] += rng.uniform(0, 0.2) * rng.normal(size=(end - start, 12)) * (kind >= -3)
    return torch.from_numpy(blocks.clip(0, 1)).float(), torch.from_numpy(chords)


def _stretches(rng: np.random.Generator, count: int) -> Iterator[tuple[int, int]]:
    start = 0
    while start < count:
        end = min(count, start + int(rng.integers(5, 41)))
        yield start, end
        start = end


def _label(item: Item, told: Mapping[str, ReadOut]) -> ChromaSong:
    blocks, sounding = {}, {}
    for track, read_out in told.items():
        chroma = average_blocks(read_out.chroma[0].numpy(), CHROMA_RATE_HZ)
        active = at_chroma_rate(estimate_activity(read_out.mel[0]))
        blocks[track] = torch.from_numpy(chroma).float()
        sounding[track] = torch.from_numpy(average_blocks(active, CHROMA_RATE_HZ) >= 0.5)
    assert item.key is not None, "only labelled items are read"
    chords = torch.from_numpy(chords_of_blocks(item.chords, len(blocks["accompaniment"])))
    return ChromaSong(blocks=blocks, sounding=sounding, chords=chords, key=key_of(item.key))
