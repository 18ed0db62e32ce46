"""Shards of token pairs on disk: what the language model trains on and is scored on.

A folder holds `tokens-00000.safetensors`, ... with two tensors each, "vocal" and "accompaniment" [frames]
int32, the songs of the shard end to end, and `index.json`: where each song lies, which tokenizer made it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from duotok.lm.dual_track.layout import TRACKS
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_json, write_tensors

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

    def __post_init__(self) -> None:
        places = (self.shard, self.start, self.frames)
        if not all(isinstance(place, int) and place >= 0 for place in places) or self.frames < 1:
            raise ValueError(f"item {self.id!r} lies nowhere: shard, start, frames = {places}")

    def fraction(self, purpose: str) -> float:
        """A number in [0, 1) that depends on the purpose and the song's name only."""
        return int(sha256(f"{purpose}:{self.song}".encode()).hexdigest()[:12], 16) / 16**12


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


def split_songs(songs: Sequence[TokenSong], hold_out: float) -> tuple[list[TokenSong], list[TokenSong]]:
    """Return what is trained on and what is held out, song by song, by a hash of their names for good."""
    held_out = [song for song in songs if song.fraction("hold-out") < hold_out]
    return [song for song in songs if song.fraction("hold-out") >= hold_out], held_out


def shard_path(folder: Path, number: int) -> Path:
    """Return the file of a shard."""
    return folder / f"tokens-{number:05d}.safetensors"


def write_index(folder: Path, index: TokenIndex) -> None:
    """Write index.json as a whole file."""
    write_json(folder / INDEX, {"format": FORMAT, **asdict(index)})


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
        index = TokenIndex(songs=songs, **mapping)
        if sorted(index.codebook_sizes) != sorted(TRACKS) or not index.frame_rate_hz > 0:
            raise ValueError("tracks or frame rate")
        return index
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
    write_tensors(shard_path(folder, number), tensors)
    # The shard counts from the moment the index names it; one without an entry is written over.
    index.songs.extend(songs)
    write_index(folder, index)


class TokenShards:
    """All token pairs of a folder, memory-mapped; a shard is opened when it is first read from."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        index = read_index(self.folder)
        if index is None or not index.songs:
            raise DataError(
                f"{folder} holds no {INDEX} with items; run python -m duotok.recipes.lm.tokenize first"
            )
        self.index = index
        self._shards: dict[int, dict[str, Tensor]] = {}
        ends: dict[int, int] = {}
        for song in index.songs:
            ends[song.shard] = max(ends.get(song.shard, 0), song.start + song.frames)
        for number, frames in sorted(ends.items()):
            check_shard(shard_path(self.folder, number), frames)

    def codes(self, song: TokenSong, start: int = 0, frames: int | None = None) -> dict[str, Tensor]:
        """Return {track: codes [frames] int64} of a song from frame `start` on."""
        stop = song.frames if frames is None else min(song.frames, start + frames)
        shard = self._shard(song.shard)
        return {track: shard[track][song.start + start : song.start + stop].long() for track in TRACKS}

    def _shard(self, number: int) -> dict[str, Tensor]:
        if number not in self._shards:
            path = shard_path(self.folder, number)
            try:
                shard = load_file(path)
            except (OSError, SafetensorError) as error:
                raise _damaged(path) from error
            for track, size in self.index.codebook_sizes.items():
                low, high = (int(value) for value in shard[track].aminmax())
                if low < 0 or high >= size:
                    raise DataError(
                        f"{path} has {track} codes {low}..{high}, {INDEX} says 0..{size - 1}; "
                        "make the tokens again"
                    )
            self._shards[number] = shard
        return self._shards[number]


def check_tokens(shards: TokenShards, fingerprint: str) -> None:
    """Raise DataError unless the tokens were made by the tokenizer of that fingerprint."""
    if shards.index.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"the tokens in {shards.folder} were made by the tokenizer {shards.index.tokenizer_fingerprint}, "
            f"not by {fingerprint}; make them again"
        )


def check_shard(path: Path, frames: int) -> None:
    """Raise DataError unless a shard is whole and holds so many frames; only its head is read."""
    try:
        with safe_open(path, framework="pt") as file:  # refuses a file shorter than its head says
            held = min(file.get_slice(track).get_shape()[0] for track in TRACKS)
    except (OSError, SafetensorError) as error:
        raise _damaged(path) from error
    if held < frames:
        raise DataError(f"{path} holds {held} frames, {INDEX} names {frames}; make the tokens again")


def _damaged(path: Path) -> DataError:
    return DataError(f"{path} is missing or damaged; make the tokens again")
