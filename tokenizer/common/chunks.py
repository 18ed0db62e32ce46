"""Long inputs in chunks that see a little more to each side, so that joined they are one pass over all."""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor


class Chunk(NamedTuple):
    """Frames start..stop, for which low..high are looked at."""

    start: int
    stop: int
    low: int
    high: int

    def inside(self, rate: int = 1) -> slice:
        """Where the chunk's own part lies in what was computed of low..high, `rate` values per frame."""
        return slice((self.start - self.low) * rate, (self.stop - self.low) * rate)


MOST_WASTE = 0.3  # frames that are looked at for their neighbours alone, over frames that are kept


def chunk_size(smallest: int, halo: int) -> int:
    """Return of how many frames chunks with a halo are, so that no more than MOST_WASTE is computed twice."""
    return max(smallest, math.ceil(2 * halo / MOST_WASTE))


def plan_chunks(frames: int, size: int, halo: int, *, grain: int = 1) -> Iterator[Chunk]:
    """Cover frames by chunks with a halo to each side; what they look at begins at multiples of grain."""
    for start in range(0, frames, size):
        stop = min(frames, start + size)
        low = max(0, start - halo) // grain * grain
        yield Chunk(start=start, stop=stop, low=low, high=min(frames, stop + halo))


def join_chunks(
    frames: int, compute: Callable[[int, int], Tensor], *, size: int, halo: int, rate: int = 1
) -> Tensor:
    """Join compute(low, high) [batch, (high - low) * rate, ...] over chunks: [batch, frames * rate, ...].

    compute must depend on at most `halo` frames to each side.
    """
    joined: Tensor | None = None
    for chunk in plan_chunks(frames, size, halo):
        part = compute(chunk.low, chunk.high)[:, chunk.inside(rate)]
        if joined is None:  # made once, because a list of parts and their sum would be twice as large
            joined = part.new_empty(part.shape[0], frames * rate, *part.shape[2:])
        joined[:, chunk.start * rate : chunk.stop * rate] = part
    assert joined is not None, "there must be at least one frame"
    return joined
