"""Songs of any length for the evaluation: the bars of one test item, again and again."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from duotok.recipes.corpus.manifest import Item
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import DataError

_LEAST_BEATS = 4


@dataclass(frozen=True, kw_only=True)
class LongSong:
    """Bars of an item, repeated in time."""

    item: Item
    vocal: Tensor  # [2, samples]
    accompaniment: Tensor  # [2, samples], the corpus' own band
    beats_seconds: np.ndarray  # [beats]


def choose_items(items: Sequence[Item], count: int, seed: int) -> list[Item]:
    """At most `count` items with at least two bars, one of each song before a second one of any, by seed."""
    usable = [item for item in items if len(item.downbeats_seconds) > 1 and len(_whole_bars(item)[2]) > 0]
    if not usable:
        raise DataError("no test item has two bars with beats to repeat")
    order = np.random.default_rng(seed).permutation(len(usable))
    seen: dict[str, int] = {}
    ranked = []
    for index in order:
        item = usable[index]
        ranked.append((seen.get(item.song, 0), item))
        seen[item.song] = seen.get(item.song, 0) + 1
    ranked.sort(key=lambda pair: pair[0])  # stable
    return [item for _, item in ranked[:count]]


def repeat_bars(item: Item, seconds: float) -> LongSong:
    """Return a song of `seconds` from an item's first bar line to its last one, again and again."""
    start, length, beats = _whole_bars(item)
    samples, bars = round(seconds * SAMPLE_RATE_HZ), round(length * SAMPLE_RATE_HZ)
    times = -(-samples // bars)
    tracks = {
        track: item.read(track, start_seconds=start, seconds=length)[:, :bars].repeat(1, times)[:, :samples]
        for track in ("vocal", "accompaniment")
    }
    placed = np.concatenate([beats + number * bars / SAMPLE_RATE_HZ for number in range(times)])
    return LongSong(item=item, beats_seconds=placed[placed < seconds], **tracks)


def _whole_bars(item: Item) -> tuple[float, float, np.ndarray]:
    """Start and length in seconds of an item's whole bars, and the beats in them from their start on."""
    start, end = item.downbeats_seconds[0], min(item.downbeats_seconds[-1], item.seconds)
    beats = np.asarray(item.beats_seconds, dtype=float) - start
    slack = 1e-3  # times in a manifest are rounded
    beats = beats[(beats >= -slack) & (beats < end - start - slack)].clip(min=0)
    return start, end - start, beats if len(beats) >= _LEAST_BEATS else beats[:0]
