"""What one run of the evaluation measures: its settings, and the excerpts that every part measures on."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured, on what."""

    corpus: Path  # folder with test.jsonl
    bundle: Path
    split: str = "test"  # or validation, to choose settings by; nothing else is comparable
    items: int | None = None  # test items that are measured; None = each part's own default
    seconds: float | None = None  # length of each excerpt; None = each part's own default
    seed: int = 0
    real_stems: Path | None = None  # folder with the four stems of a real song, for the separator
    recordings: Path | None = None  # folder of real recordings, for the VAE
    vae: Path | None = None  # folder of a VAE to measure alone, in place of the bundle's renderer
    codecs: tuple[str, ...] = ()  # acoustic codecs of `codec`: folders or hub ids; () = the bundle's own
    separators: tuple[str, ...] = ()  # NAME or NAME=CHECKPOINT, that `separation` compares
    visqol: bool = False  # whether these are judged by ViSQOL, too
    speed: bool = True  # whether `generate` (on 30 s and 180 s), encoding and decoding are also timed
    sound: bool = True  # whether `decoding`, `long` and `whole` render what they compose, and listen to it
    composed: bool = True  # whether `whole` composes; else it measures what the band plans, in seconds
    plots: Path | None = None  # folder for the pictures of the parts that draw some
    folder: Path | None = None  # of quality's table and picture; None = only its figures; of sweep's points
    track: str | None = None  # that `quality` judges; None = both
    tokens: Path | None = None  # of training items, for the probes of `style`
    manifest: Path | None = None  # of these tokens; None = the corpus' train.jsonl
    musdb: Path | None = None  # folder of MUSDB18-HQ, for `accompgen`

    def __post_init__(self) -> None:
        if self.items is not None and self.items < 2:
            raise ConfigError(f"--items must be at least 2, for mismatched pairs, got {self.items}")
        if self.seconds is not None and self.seconds < 4:
            raise ConfigError(f"--seconds must be at least 4, got {self.seconds:g}")


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
        return self._inside(self.item.beats_seconds)

    @property
    def downbeats_seconds(self) -> np.ndarray:
        """The beginnings of its bars, likewise [bars]."""
        return self._inside(self.item.downbeats_seconds)

    def _inside(self, times: Sequence[float]) -> np.ndarray:
        found = np.asarray(times, dtype=float) - self.start_seconds
        return found[(found >= 0) & (found <= self.seconds)]


def read_items(settings: Settings) -> list[Item]:
    """All items that settings name."""
    return read_split(settings.corpus, settings.split)


def read_split(corpus: Path, split: str = "test") -> list[Item]:
    """All items of corpus/<split>.jsonl, which must hold that split and nothing else."""
    path = corpus / f"{split}.jsonl"
    items = read_manifest(path)
    foreign = [item.id for item in items if item.split != split]
    if foreign:
        raise DataError(f"{path} holds {foreign[0]}, which is not of the {split} split")
    if not items:
        raise DataError(f"{path} has no items; make them by duotok.recipes.corpus.popband")
    return sorted(items, key=lambda item: item.id)


def excerpts_of(
    settings: Settings, items: int = 24, seconds: float = 20.0, *, per_item: int = 1
) -> list[Excerpt]:
    """The excerpts of a part: as many and as long as settings say, or else by the part's defaults."""
    return choose_excerpts(
        read_items(settings),
        count=settings.items or items,
        seconds=settings.seconds or seconds,
        seed=settings.seed,
        per_item=per_item,
    )


def choose_excerpts(
    items: Sequence[Item], *, count: int, seconds: float, seed: int, per_item: int = 1
) -> list[Excerpt]:
    """At most `count` excerpts, of as many different songs and items as possible, chosen by seed.

    Each is the stretch (on a grid of 1 s) of its item in which most is sung, for without singing there is
    nothing to fit; second ones of an item (up to per_item) do not overlap the first. Shorter items are left
    out.
    """
    rng = np.random.default_rng(seed)
    long_enough = [item for item in items if item.seconds >= seconds]
    if not long_enough:
        longest = max(items, key=lambda item: item.seconds)
        raise DataError(
            f"no test item has {seconds:g} s; the longest has {longest.seconds:g} s: lower --seconds"
        )
    starts = [(item, _most_sung_starts(item, seconds)) for item in spread_over_songs(long_enough, rng)]
    return [
        Excerpt(item=item, start_seconds=found[turn], seconds=seconds)
        for turn in range(per_item)
        for item, found in starts
        if turn < len(found)
    ][:count]


def join_items(items: Sequence[Item], track: str, seconds: float) -> Tensor:
    """A track of one item after another, from the start again when they are too few: [2, samples]."""
    wanted, pieces = round(seconds * SAMPLE_RATE_HZ), list[Tensor]()
    while sum(piece.shape[-1] for piece in pieces) < wanted:
        pieces.append(items[len(pieces) % len(items)].read(track))
    return torch.cat(pieces, dim=1)[:, :wanted]


def spread_over_songs(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """The items in random order, but first one of each song, then second ones, and so on."""
    seen: dict[str, int] = {}
    ranked = []
    for index in rng.permutation(len(items)):
        item = items[index]
        ranked.append((seen.get(item.song, 0), item))
        seen[item.song] = seen.get(item.song, 0) + 1
    return [item for _, item in sorted(ranked, key=lambda pair: pair[0])]  # stable


def _most_sung_starts(item: Item, seconds: float) -> list[float]:
    """Where stretches that do not overlap begin, the most sung one first."""
    starts = np.arange(0.0, item.seconds - seconds + 1e-6, 1.0)
    notes = np.array([(start, end) for start, end, *_ in item.notes]).reshape(-1, 2)
    overlap = np.minimum(notes[None, :, 1], starts[:, None] + seconds) - np.maximum(
        notes[None, :, 0], starts[:, None]
    )
    found: list[float] = []
    for start in starts[np.argsort(-np.clip(overlap, 0, None).sum(axis=1), kind="stable")]:
        if all(abs(start - other) >= seconds for other in found):
            found.append(float(start))
    return found
