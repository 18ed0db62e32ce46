"""What a separator is, and what the adapters share: long waves in pieces, stems that sum up."""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
from torch import Tensor

from duotok.tokenizer.heads import STEMS


class Separator(Protocol):
    """Splits a mix into stems."""

    name: str

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] float32 at 48 kHz -> {"vocal", "drums", "bass", "other"}, each [2, samples].

        The stems sum to the wave; what belongs to none of them is in "other".
        """
        ...


def separate_in_pieces(
    wave: Tensor, separate: Callable[[Tensor], Tensor], *, piece: int, overlap: int
) -> Tensor:
    """Run `separate` [2, n] -> [stems, 2, n] over pieces of a wave [2, samples], cross-faded.

    piece and overlap are in samples, 0 < overlap <= piece / 2. Only one piece is in work at a time.
    """
    samples = wave.shape[-1]
    result: Tensor | None = None
    rise = (torch.arange(overlap, dtype=wave.dtype) + 0.5) / overlap  # rise + its mirror image = 1
    for start in range(0, max(1, samples - overlap), piece - overlap):
        stems = separate(wave[:, start : start + piece])
        length = stems.shape[-1]
        if start > 0:
            stems[..., :overlap] *= rise
        if start + length < samples:
            stems[..., -overlap:] *= rise.flip(0)
        if result is None:
            result = torch.zeros(*stems.shape[:-1], samples)
        result[..., start : start + length] += stems
    assert result is not None
    return result


def complete_stems(wave: Tensor, estimates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Four stems that sum to the wave: vocal, drums, bass as estimated (or silent), other = the rest."""
    stems = {stem: estimates.get(stem, torch.zeros_like(wave)) for stem in STEMS[:3]}
    stems["other"] = wave - stems["vocal"] - stems["drums"] - stems["bass"]
    return stems
