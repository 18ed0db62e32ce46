"""The random excerpts of a corpus that autoencoders learn from."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from torch import Tensor
from torch.nn import functional

from duotok.recipes.corpus.manifest import PARTS, Item, read_manifest
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError, DataError

_GAINS_DB = (-12.0, 4.0)


@dataclass(frozen=True, kw_only=True)
class ExcerptConfig:
    """Which sound is heard, and how long."""

    manifest: str
    seconds: float = 3.0  # length of an excerpt
    parts: dict[str, float] = field(default_factory=lambda: {"accompaniment": 7.0, "vocal": 1.5, "mix": 1.5})

    def __post_init__(self) -> None:
        if self.seconds < 0.2:
            raise ConfigError(f"data.seconds must be at least 0.2, got {self.seconds}")
        unknown = sorted(set(self.parts) - set(PARTS))
        if unknown or not self.parts or min(self.parts.values()) < 0 or sum(self.parts.values()) <= 0:
            raise ConfigError(f"data.parts must give shares to some of {', '.join(PARTS)}, got {self.parts}")


def read_items(data: ExcerptConfig) -> list[Item]:
    """The songs of the manifest; DataError where there are none."""
    items = read_manifest(data.manifest)
    if not items:
        raise DataError(f"the manifest {data.manifest} is empty; make a corpus first")
    return items


def draw_excerpt(rng: np.random.Generator, items: Sequence[Item], data: ExcerptConfig) -> Tensor:
    """Return a random excerpt [2, samples]: any part of any song, at any level, sides swapped at random."""
    item = items[int(rng.integers(len(items)))]
    shares = np.array(list(data.parts.values()))
    part = list(data.parts)[int(rng.choice(len(shares), p=shares / shares.sum()))]
    start = float(rng.uniform(0, max(0.0, item.seconds - data.seconds)))
    wave = read_cut(item, part, start, data.seconds)
    wave = wave * 10 ** (float(rng.uniform(*_GAINS_DB)) / 20)
    return wave.flip(0) if rng.random() < 0.5 else wave


def read_cut(item: Item, part: str, start_seconds: float, seconds: float) -> Tensor:
    """Return a part of an item from there on [2, samples]; what it lacks of the length is silence."""
    wave = item.read(part, start_seconds=start_seconds, seconds=seconds)
    return functional.pad(wave, (0, round(seconds * SAMPLE_RATE_HZ) - wave.shape[1]))
