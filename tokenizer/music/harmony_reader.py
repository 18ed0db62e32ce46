"""The harmony reader: chroma becomes chords and keys by one small network that all twelve roots share.

Each root is judged by the same weights on the chroma turned so that this root comes first, so what is learned
in one key holds in every key. Learned by `duotok.recipes.tokenizer.train_harmony_reader`; the weights
beside this file are what `generate` reads music with. They see chroma only, not codes, and so outlive a
tokenizer.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..common.component import Component
from ..common.errors import ConfigError
from .chord_names import CHORDS

BLOCK_RATE_HZ = 10.0  # chroma is averaged to this rate
KEYS = 24  # twelve major, twelve minor
# The mean chroma of these stretches of blocks around the judged one, finer near it: 1.2 s to each side.
STRETCHES = ((-12, -6), (-6, -3), (-3, -1), (-1, 0), (0, 1), (1, 2), (2, 4), (4, 7), (7, 13))
WEIGHTS = Path(__file__).parent / "weights"
_CHUNK_BLOCKS = 2_048


@dataclass(frozen=True, kw_only=True)
class HarmonyReaderConfig:
    """Settings of the reader."""

    hidden_dim: int = 64

    def __post_init__(self) -> None:
        if self.hidden_dim < 1:
            raise ConfigError(f"hidden_dim must be at least 1, got {self.hidden_dim}")


class HarmonyReader(Component[HarmonyReaderConfig]):
    """Chord of every block of 0.1 s, and key of a whole track."""

    KIND = "harmony-reader"
    CONFIG = HarmonyReaderConfig

    turns: Tensor

    def __init__(self, config: HarmonyReaderConfig) -> None:
        super().__init__(config)
        self.hidden = nn.Linear(12 * len(STRETCHES), config.hidden_dim)
        self.triads = nn.Linear(config.hidden_dim, 2)  # major and minor on the root
        self.no_chord = nn.Linear(config.hidden_dim, 1)
        # Key from the profile of pitch classes; for an accompaniment also from the shares of its chords.
        self.vocal_key = nn.Linear(12, 2)
        self.accompaniment_key = nn.Linear(36, 2)
        steps = torch.arange(12)
        self.register_buffer("turns", (steps[:, None] + steps[None, :]) % 12, persistent=False)

    def forward(self, around: Tensor) -> Tensor:
        """Chroma around n blocks (see `surroundings`) [n, stretches, 12] -> log-probabilities [n, 25]."""
        hidden = functional.gelu(self.hidden(self._turn(around).flatten(2)))  # [n, 12 roots, hidden]
        triads = self.triads(hidden).transpose(1, 2).flatten(1)  # [n, 24]: major, then minor
        return torch.cat([triads, self.no_chord(hidden).mean(dim=1)], dim=1).log_softmax(dim=1)

    @torch.no_grad()
    def judge(self, blocks: Tensor) -> Tensor:
        """Chroma blocks [blocks, 12] at 10 Hz, any number -> log-probabilities [blocks, 25]."""
        pieces = [self(around) for around in surroundings(blocks).split(_CHUNK_BLOCKS)]
        return torch.cat(pieces) if pieces else blocks.new_zeros(0, CHORDS)

    def key_logits(self, evidence: Tensor, track: str) -> Tensor:
        """Evidence [batch, maps, 12] of a track (see `key_evidence`) -> [batch, 24]: major, then minor."""
        return self.key_layer(track)(self._turn(evidence).flatten(2)).transpose(1, 2).flatten(1)

    def key_layer(self, track: str) -> nn.Linear:
        """The weights that judge the key of a track."""
        return self.vocal_key if track == "vocal" else self.accompaniment_key

    @torch.no_grad()
    def key_evidence(self, blocks: Tensor, track: str) -> Tensor:
        """What the key of chroma blocks [blocks, 12] is judged by: [maps, 12] shares.

        The mean profile of pitch classes and, for an accompaniment, the shares of major and minor chords.
        """
        profile = (blocks / blocks.sum(dim=1, keepdim=True).clamp_min(1e-6)).mean(dim=0)
        if track == "vocal":
            return profile[None]
        chords = self.judge(blocks).exp().mean(dim=0)
        return torch.stack([profile, chords[:12], chords[12:24]])

    def _turn(self, maps: Tensor) -> Tensor:
        """[..., maps, 12] -> [..., 12 roots, maps, 12], each root's own pitch class first."""
        return maps[..., self.turns].transpose(-3, -2)


@cache
def default_reader() -> HarmonyReader:
    """The reader that ships with the package, loaded once."""
    return HarmonyReader.from_pretrained(WEIGHTS)


def surroundings(blocks: Tensor) -> Tensor:
    """Mean chroma of each of STRETCHES around every block: [blocks, 12] -> [blocks, stretches, 12].

    Stretches are cut at the borders; those wholly outside are zeros.
    """
    count = len(blocks)
    sums = functional.pad(blocks.double().cumsum(dim=0), (0, 0, 1, 0))
    place = torch.arange(count, device=blocks.device)
    means = []
    for first, end in STRETCHES:
        low, high = (place + first).clamp(0, count), (place + end).clamp(0, count)
        means.append((sums[high] - sums[low]) / (high - low).clamp_min(1)[:, None])
    return torch.stack(means, dim=1).to(blocks.dtype)
