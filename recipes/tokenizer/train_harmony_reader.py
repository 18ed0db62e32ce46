"""Learn to read chords and keys out of chroma from the labels of a training corpus.

Run: python -m duotok.recipes.tokenizer.train_harmony_reader CONFIG.yaml --out runs/small/harmony
The result, runs/small/harmony/final, goes into tokenizer/music/weights; it is worth learning anew when the
tokenizer's chroma has become better.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.tokens import TokenShards, check_tokens
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import TRACKS, DuoTokenizer, ReadOut
from duotok.tokenizer.music.chroma import (
    BLOCK_RATE_HZ,
    CHROMA_RATE_HZ,
    at_chroma_rate,
    average_blocks,
    estimate_activity,
)
from duotok.tokenizer.music.harmony import HarmonyReader, HarmonyReaderConfig, surroundings
from duotok.tokenizer.music.labels import NO_CHORD, UNKNOWN_CHORD, chords_of_blocks, key_of

_KEY_DECAY = 0.01  # penalty of the key weights' squares


def is_labelled(item: Item) -> bool:
    """Whether the chords and the key of an item are known."""
    return bool(item.chords) and bool(item.key)


@dataclass(frozen=True, kw_only=True)
class LabelledChromaConfig:
    """Where the songs come from."""

    manifest: str  # training manifest with chords and keys
    tokenizer: str  # tokenizer folder
    tokens: str  # shards that this tokenizer made of the manifest (duotok.recipes.lm.tokenize)
    items: int = 400  # at most, the first of the shards
    heard_every: int = 4  # every so many items are also learned from by the true chroma of their audio

    def __post_init__(self) -> None:
        if min(self.items, self.heard_every) < 1:
            raise ConfigError("data.items and data.heard_every must be at least 1")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the harmony reader's training."""

    data: LabelledChromaConfig
    model: HarmonyReaderConfig = field(default_factory=HarmonyReaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


@dataclass(frozen=True, kw_only=True)
class ChromaSong:
    """The chroma of both tracks of one item and what is known about it."""

    blocks: dict[str, Tensor]  # of each track [blocks, 12]
    sounding: dict[str, Tensor]  # of each track [blocks] bool
    chords: Tensor  # [blocks] int64: 0-11 major, 12-23 minor, 24 no chord, -1 unknown
    key: int  # 0-11 major, 12-23 minor


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    songs = read_songs(config.data)
    reader = HarmonyReader(config.model)

    sampler = BlockSampler(songs)

    def make_batch(rng):
        return sampler.draw(rng, config.train.batch_size)

    def export(folder: Path) -> None:
        finished = HarmonyReader(config.model)
        finished.load_state_dict({name: tensor.cpu() for name, tensor in reader.state_dict().items()})
        fit_keys(finished, songs)
        finished.save_pretrained(folder, half=True, extra={"songs": len(songs)})

    return Task(ChordObjective(reader), make_batch, export)


class ChordObjective(nn.Module):
    """Cross-entropy of the chord of every block whose chord is known."""

    def __init__(self, reader: HarmonyReader) -> None:
        super().__init__()
        self.reader = reader
        reader.vocal_key.requires_grad_(False)  # fitted at the end, see `fit_keys`
        reader.accompaniment_key.requires_grad_(False)

    def forward(self, around: Tensor, chords: Tensor) -> dict[str, Tensor]:
        """around [batch, stretches, 12], chords [batch] -> named losses in nats."""
        judged = self.reader(around)
        accuracy = (judged.detach().argmax(dim=-1) == chords).float().mean()
        return {"total": functional.nll_loss(judged, chords), "accuracy": accuracy}


def fit_keys(reader: HarmonyReader, songs: Sequence[ChromaSong]) -> None:
    """Fit the key weights of both tracks by logistic regression, all roots sharing theirs."""
    for track in TRACKS:
        heard = [song for song in songs if song.sounding[track].any()]
        keys = torch.tensor([song.key for song in heard])
        evidence = torch.stack(
            [reader.key_evidence(song.blocks[track][song.sounding[track]], track) for song in heard]
        )
        # Every map at zero mean and unit deviation while fitting; undone in the weights below.
        mean = evidence.mean(dim=(0, 2), keepdim=True)
        deviation = evidence.std(dim=(0, 2), keepdim=True).clamp_min(1e-6)
        layer = reader.key_layer(track)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer = torch.optim.LBFGS(
            [layer.weight.requires_grad_(), layer.bias.requires_grad_()],
            max_iter=200,
            line_search_fn="strong_wolfe",
        )

        def penalized(
            evidence=(evidence - mean) / deviation, keys=keys, track=track, layer=layer, optimizer=optimizer
        ):
            optimizer.zero_grad()
            loss = functional.cross_entropy(reader.key_logits(evidence, track), keys)
            loss = loss + _KEY_DECAY * layer.weight.square().sum()
            loss.backward()
            return loss

        optimizer.step(penalized)
        with torch.no_grad():
            layer.weight.div_(deviation.flatten().repeat_interleave(12))
            layer.bias.sub_(layer.weight @ mean.flatten().repeat_interleave(12))


def read_songs(config: LabelledChromaConfig) -> list[ChromaSong]:
    """The chroma of every labelled item of the shards, read out of codes and, of some, from the audio too."""
    items = {item.id: item for item in read_manifest(config.manifest)}
    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = TokenShards(config.tokens)
    check_tokens(shards, str(tokenizer.fingerprint))
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
    end = 0
    while end < block_count:
        start, end = end, min(block_count, end + int(rng.integers(5, 41)))
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


def _label(item: Item, told: Mapping[str, ReadOut]) -> ChromaSong:
    blocks, sounding = {}, {}
    for track, read_out in told.items():
        chroma = average_blocks(read_out.chroma[0].numpy(), CHROMA_RATE_HZ)
        active = at_chroma_rate(estimate_activity(read_out.mel[0]))
        blocks[track] = torch.from_numpy(chroma).float()
        sounding[track] = torch.from_numpy(average_blocks(active, CHROMA_RATE_HZ) >= 0.5)
    assert item.key is not None, "only labelled items are read"
    chords = torch.from_numpy(chords_of_blocks(item.chords, len(blocks["accompaniment"]), BLOCK_RATE_HZ))
    return ChromaSong(blocks=blocks, sounding=sounding, chords=chords, key=key_of(item.key))


main = recipe_main("Chords and keys from chroma", Config, build)

if __name__ == "__main__":
    sys.exit(main())
