"""What a melody asks for by itself: the chord under each of its beats, and which beats begin a bar.

A small network hears a melody as a score has it, on its beats and relative to its key, through some sixteen
bars to each side. It has learned from far more scores than have ever been sung to it, so what it knows of
chords and bars comes on top of what is heard in a voice. Learned by
`python -m duotok.recipes.tokenizer.train_melody_reader`; the weights beside this file outlive a tokenizer.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..common.checkpoint import Component
from ..common.errors import ConfigError
from .labels import NO_CHORD
from .progressions import relative_to

PARTS = 4  # of a beat
MOST_BEATS = 6  # of a bar
PACES = (1.0, 2.0, 0.5)  # beats that are counted for one of the song's; of bars of four alone
WEIGHTS = Path(__file__).parent / "weights" / "melody"


@dataclass(frozen=True, kw_only=True)
class MelodyReaderConfig:
    """Settings of the reader."""

    dim: int = 64
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    dropout: float = 0.2

    def __post_init__(self) -> None:
        if min(self.dim, *self.dilations) < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("the melody reader's sizes must be above 0, its dropout in [0, 1)")


class MelodyReader(Component[MelodyReaderConfig]):
    """Chord and number in the bar of every beat of a melody, and whether the beats are the song's own."""

    KIND = "melody-reader"
    CONFIG = MelodyReaderConfig

    def __init__(self, config: MelodyReaderConfig) -> None:
        super().__init__(config)
        self.sung = nn.Linear(PARTS * 12, config.dim)
        self.number = nn.Embedding(MOST_BEATS + 1, config.dim)  # the first: not known
        self.meter = nn.Embedding(MOST_BEATS + 1, config.dim)  # the first: not known
        self.mode = nn.Embedding(2, config.dim)
        self.blocks = nn.ModuleList(_Block(config.dim, d, config.dropout) for d in config.dilations)
        self.norm = nn.LayerNorm(config.dim)
        self.heads = nn.Linear(config.dim, NO_CHORD + MOST_BEATS + len(PACES))

    def forward(self, sung: Tensor, numbers: Tensor, meters: Tensor, modes: Tensor) -> tuple[Tensor, ...]:
        """Logits [batch, beats, ...] of the chord, the number in the bar and the pace.

        sung: shares of pitch classes [batch, beats, PARTS, 12] over the tonic of the major key with these
        sharps, as chords are. numbers, meters [batch, beats]: the beat's in its bar, -1 where not known, and
        how many a bar has, 0 where not known. modes [batch, beats]: 1 in minor.
        """
        features = self.sung(sung.flatten(2)) + self.number(numbers + 1)
        features = features + self.meter(meters) + self.mode(modes)
        for block in self.blocks:
            features = block(features)
        return self.heads(self.norm(features)).split([NO_CHORD, MOST_BEATS, len(PACES)], dim=-1)

    @torch.no_grad()
    def judge(
        self, sung: np.ndarray, keys: np.ndarray, beats_per_bar: int, numbers: np.ndarray | None = None
    ) -> tuple[np.ndarray, ...]:
        """Log-probabilities of the chord [beats, NO_CHORD], the number [beats, 6] and the pace [beats, 3].

        sung: shares of pitch classes, C first [beats, PARTS, 12]; keys [beats], 12-23 minor; numbers [beats]:
        each beat's in its bar, -1 where not known.
        """
        tonics = tonics_of(keys)
        numbers = np.full(len(keys), -1) if numbers is None else numbers
        told = self(
            torch.from_numpy(over_tonics(sung, tonics)).float()[None],
            torch.from_numpy(numbers)[None],
            torch.full((1, len(keys)), beats_per_bar),
            torch.from_numpy(keys // 12)[None],
        )
        chords, *others = (logits[0].double().log_softmax(dim=-1).numpy() for logits in told)
        relative = relative_to(np.arange(NO_CHORD)[None], tonics[:, None])
        return np.take_along_axis(chords, relative, axis=1), *others


@cache
def default_melody_reader() -> MelodyReader:
    """The reader that ships with the package, loaded once."""
    return MelodyReader.from_pretrained(WEIGHTS)


def tonics_of(keys: np.ndarray) -> np.ndarray:
    """The tonic of a major key, or of the major key with the sharps of a minor one."""
    return np.where(keys < 12, keys, keys + 3) % 12


def over_tonics(sung: np.ndarray, tonics: np.ndarray) -> np.ndarray:
    """Pitch classes [beats, PARTS, 12] with the tonic [beats] first."""
    index = (np.arange(12) + tonics[:, None, None]) % 12
    return np.take_along_axis(sung, np.broadcast_to(index, sung.shape), axis=2)


class _Block(nn.Module):
    """A gated convolution over beats around a skip connection."""

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Conv1d(dim, 2 * dim, 3, padding=dilation, dilation=dilation)
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        value, gate = self.gated(self.norm(features).transpose(1, 2)).chunk(2, dim=1)
        return features + self.dropout(self.out((value * torch.sigmoid(gate)).transpose(1, 2)))
