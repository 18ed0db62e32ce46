"""How evenly a track's codes are used (P E.1, figure 6, table 11)."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotok.lm.metrics import code_counts, normalized_entropy, unigram_entropy_bits, utilization
from duotok.tokenizer.model import TRACKS

# P table 11: DuoTok's utilization and normalized entropy.
PAPER_USAGE = {"vocal": (0.9996, 0.9188), "accompaniment": (0.9995, 0.9494)}


@dataclass(frozen=True, kw_only=True)
class CodeUsage:
    """How often each code of a track occurs."""

    track: str
    counts: Tensor  # [codebook_size] int64

    @property
    def tokens(self) -> int:
        """Number of tokens counted."""
        return int(self.counts.sum())

    @property
    def largest_utilization(self) -> float:
        """Share of the codes that so many tokens reach on average if all codes are equally likely."""
        size = len(self.counts)
        return 1.0 - (1.0 - 1.0 / size) ** self.tokens

    def sorted_shares(self) -> np.ndarray:
        """Each code's share of the tokens, largest first: [codebook_size]."""
        return np.sort(self.counts.numpy())[::-1] / max(self.tokens, 1)

    def figures(self) -> dict[str, float]:
        """Flat figures; perplexity: as many equally likely codes have the same entropy."""
        tenth = max(1, len(self.counts) // 10)
        found = {
            "utilization": utilization(self.counts),
            "utilization_of_uniform_codes": self.largest_utilization,
            "normalized_entropy": normalized_entropy(self.counts),
            "perplexity_codes": 2 ** unigram_entropy_bits(self.counts),
            "share_of_most_used_tenth": float(self.sorted_shares()[:tenth].sum()),
            "codes": len(self.counts),
            "tokens": self.tokens,
        }
        return {f"{self.track}_{name}": value for name, value in found.items()}


def count_usage(items: Iterable[Mapping[str, Tensor]], sizes: Mapping[str, int]) -> dict[str, CodeUsage]:
    """Usage by track of items' codes {track: codes [frames]}; sizes: of the codebooks."""
    items = list(items)
    return {
        track: CodeUsage(
            track=track, counts=code_counts(torch.cat([item[track] for item in items]), sizes[track])
        )
        for track in TRACKS
    }
