"""Shards of token pairs on disk: what the language model trains on and is scored on.

A folder holds `tokens-00000.safetensors`, ... with two tensors each, "vocal" and "accompaniment" [frames]
int32, the songs of the shard end to end, and `index.json`: where each song lies, which tokenizer made it.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from duotok.lm.layout import TRACKS
from duotok.tokenizer.common.errors import DataError

FORMAT = 1
INDEX = "index.json"


@dataclass(frozen=True, kw_only=True)
class TokenSong:
    """One item of the corpus in a shard."""

    id: str
    song: str  # name of the song; several items may come from one
    split: str
    shard: int
    start: int  # first frame inside the shard
    frames: int


@dataclass(kw_only=True)
class TokenIndex:
    """What a folder of token shards holds."""

    tokenizer_fingerprint: str
    codebook_sizes: dict[str, int]
    frame_rate_hz: float
    songs: list[TokenSong] = field(default_factory=list)

    @property
    def shards(self) -> int:
        """Number of shards."""
        return 1 + max((song.shard for song in self.songs), default=-1)


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"tokens-{number:05d}.safetensors"


def write_index(folder: Path, index: TokenIndex) -> None:
    """Write index.json under a temporary name, then rename it."""
    mapping: dict[str, Any] = {"format": FORMAT, **asdict(index)}
    temporary = folder / f".{INDEX}.part"
    temporary.write_text(json.dumps(mapping, indent=1) + "\n", encoding="utf-8")
    temporary.replace(folder / INDEX)


def read_index(folder: str | Path) -> TokenIndex | None:
    """Return the index of a folder, or None where there is none yet."""
    path = Path(folder) / INDEX
    if not path.exists():
        return None
    try:
        mapping = json.loads(path.read_text(encoding="utf-8"))
        if mapping.pop("format") != FORMAT:
            raise DataError(f"{path} has another format than {FORMAT}; make the tokens again")
        songs = [TokenSong(**song) for song in mapping.pop("songs")]
        return TokenIndex(songs=songs, **mapping)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is damaged; delete the folder and make the tokens again") from error


def append_shard(
    folder: Path, index: TokenIndex, pairs: Mapping[str, tuple[str, str, dict[str, Tensor]]]
) -> None:
    """Write one shard of {item id: (song, split, {track: codes [frames]})} and add it to the index."""
    number, start = index.shards, 0
    songs = []
    for name, (song, split, codes) in pairs.items():
        frames = len(codes["vocal"])
        if len(codes["accompaniment"]) != frames:
            raise DataError(f"item {name}: the tracks have {frames} and {len(codes['accompaniment'])} frames")
        songs.append(TokenSong(id=name, song=song, split=split, shard=number, start=start, frames=frames))
        start += frames
    tensors = {t: torch.cat([codes[t].to(torch.int32).cpu() for *_, codes in pairs.values()]) for t in TRACKS}
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tokens-{number:05d}.part"
    save_file(tensors, temporary)
    temporary.replace(shard_path(folder, number))
    # The shard counts from the moment the index names it; one without an entry is written over.
    index.songs.extend(songs)
    write_index(folder, index)


class TokenShards:
    """All token pairs of a folder, memory-mapped."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None or not index.songs:
            raise DataError(f"{folder} holds no tokens; run python -m duotok.recipes.lm.tokenize first")
        self.index = index
        self._shards: dict[int, dict[str, Tensor]] = {}

    def codes(self, song: TokenSong, start: int = 0, frames: int | None = None) -> dict[str, Tensor]:
        """Return {track: codes [frames] int64} of a song from frame `start` on."""
        stop = song.frames if frames is None else min(song.frames, start + frames)
        shard = self._shard(song.shard)
        return {track: shard[track][song.start + start : song.start + stop].long() for track in TRACKS}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = shard_path(self.folder, number)
            try:
                self._shards[number] = load_file(path)
            except (OSError, SafetensorError) as error:
                raise DataError(f"{path} is missing or damaged; make the tokens again") from error
        return self._shards[number]
