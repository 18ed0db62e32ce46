"""Harmony out of chroma: a small reader of chords and keys, chord segments, and keys by profiles.

All twelve roots share the reader's network: each root is judged by the same weights on the chroma turned so
that this root comes first, so what is learned in one key holds in every key. Learned by
`python -m duotok.recipes.tokenizer.train_harmony_reader`; the weights beside this file are what `generate`
reads music with. They see chroma only, not codes, and so outlive a tokenizer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..common.checkpoint import Component
from ..common.errors import ConfigError
from .chroma import average_blocks, block_frames
from .labels import CHORDS, NO_CHORD, count_fifths, name_chord, name_note

# The mean chroma of these stretches of blocks around the judged one, finer near it: 1.2 s to each side.
STRETCHES = ((-12, -6), (-6, -3), (-3, -1), (-1, 0), (0, 1), (1, 2), (2, 4), (4, 7), (7, 13))
WEIGHTS = Path(__file__).parent / "weights"
_CHUNK_BLOCKS = 2_048
_CHANGE_PENALTY = 5.0  # log-probability lost by a change of chord
_IMPOSSIBLE = -100.0
_SILENT_CHROMA = 1e-6  # a block with no bin above it sounds of nothing
# C. L. Krumhansl, Cognitive Foundations of Musical Pitch (1990), table 2.1.
_PROFILES = {
    "maj": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
    "min": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17),
}
_SCALES = {"maj": (0, 2, 4, 5, 7, 9, 11), "min": (0, 2, 3, 5, 7, 8, 10)}


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


def estimate_chords(
    chroma: np.ndarray,
    rate_hz: float,
    *,
    sounding: np.ndarray | None = None,
    fifths: int = 0,
    reader: HarmonyReader | None = None,
) -> list[tuple[float, float, str]]:
    """Chord segments (start seconds, end seconds, "C:maj" | "A:min" | "N") that cover the whole input.

    chroma: [frames, 12] in 0..1, C first, at rate_hz frames per second, as the tokenizer reads it out of
    codes or measures it. sounding: [frames] at the same rate; where it is false there is no chord.
    fifths: sharps of the key that the names are spelled in. reader: None takes the one that ships.
    """
    chroma = np.asarray(chroma, dtype=np.float64)
    if len(chroma) == 0:
        return []
    blocks = average_blocks(chroma, rate_hz)
    silent = blocks.max(axis=1) <= _SILENT_CHROMA
    if sounding is not None:
        silent |= average_blocks(sounding, rate_hz) < 0.5
    scores = (reader or default_reader()).judge(torch.from_numpy(blocks).float()).double().numpy()
    scores[silent] = _IMPOSSIBLE
    scores[silent, NO_CHORD] = 0.0
    path = find_path(scores, np.full(len(scores), _CHANGE_PENALTY))
    edges = np.array([0, *(np.flatnonzero(np.diff(path)) + 1), len(path)])
    seconds = np.minimum(edges * block_frames(rate_hz), len(chroma)) / rate_hz
    names = [name_chord(int(path[begin]), fifths) for begin in edges[:-1]]
    return list(zip(seconds[:-1].tolist(), seconds[1:].tolist(), names, strict=True))


def find_path(scores: np.ndarray, costs: Sequence[float | np.ndarray] | np.ndarray) -> np.ndarray:
    """Return the best states [steps] by scores [steps, states] when a change into step i costs costs[i].

    That may be one number, or as many as there are changes: [states before, states after].
    """
    steps, states = scores.shape
    if steps == 0:
        return np.zeros(0, dtype=np.int64)
    origin = np.zeros((steps, states), dtype=np.int64)
    total = scores[0]
    for step in range(1, steps):
        chains = total[:, None] - costs[step]
        changed = chains.max(axis=0)
        origin[step] = np.where(total >= changed, np.arange(states), chains.argmax(axis=0))
        total = np.maximum(total, changed) + scores[step]
    path = np.empty(steps, dtype=np.int64)
    path[-1] = total.argmax()
    for step in range(steps - 1, 0, -1):
        path[step - 1] = origin[step, path[step]]
    return path


@dataclass(frozen=True, kw_only=True)
class Key:
    """One of the 24 major and (natural) minor keys."""

    tonic: int  # pitch class, 0 = C
    mode: str  # "maj" or "min"
    correlation: float = 1.0  # of the profile with the chroma, -1 to 1 (Krumhansl)
    probability: float | None = None  # among the 24 keys (harmony reader)

    def __str__(self) -> str:
        return f"{name_note(self.tonic, self.fifths)}:{self.mode}"

    @property
    def fifths(self) -> int:
        """Its sharps, flats below 0."""
        return count_fifths(self.tonic, self.mode)

    @property
    def scale(self) -> frozenset[int]:
        """The key's seven pitch classes."""
        return frozenset((self.tonic + step) % 12 for step in _SCALES[self.mode])


def read_key(
    chroma: np.ndarray,
    rate_hz: float,
    track: str,
    *,
    sounding: np.ndarray | None = None,
    reader: HarmonyReader | None = None,
) -> Key | None:
    """The key that a track is in by what the harmony reader has learned; None where nothing sounds.

    chroma: [frames, 12] in 0..1, C first, at rate_hz, as the tokenizer reads it out of the codes of `track`
    ("vocal" or "accompaniment") or measures it. sounding: [frames]; the others do not count.
    """
    blocks = average_blocks(chroma, rate_hz)
    heard = np.ptp(blocks, axis=1) > 1e-6 if len(blocks) else np.zeros(0, dtype=bool)
    if sounding is not None and len(blocks):
        heard &= average_blocks(sounding, rate_hz) >= 0.5
    if not heard.any():
        return None
    reader = reader or default_reader()
    evidence = reader.key_evidence(torch.from_numpy(blocks[heard]).float(), track)
    with torch.no_grad():
        probabilities = reader.key_logits(evidence[None], track)[0].softmax(dim=0)
    best = int(probabilities.argmax())
    return Key(tonic=best % 12, mode=("maj", "min")[best // 12], probability=float(probabilities[best]))


def estimate_key(chroma: np.ndarray) -> Key | None:
    """The key whose Krumhansl profile correlates best with the mean chroma; None where there is no pitch.

    chroma: [frames, 12] or [12], non-negative, C first.
    """
    mean = np.asarray(chroma, dtype=np.float64).reshape(-1, 12).mean(axis=0)
    if not np.isfinite(mean).all() or mean.std() < 1e-9:
        return None
    centred = (mean - mean.mean()) / mean.std()
    best: Key | None = None
    for mode, profile in _PROFILES.items():
        shape = np.asarray(profile)
        shape = (shape - shape.mean()) / shape.std()
        for tonic in range(12):
            correlation = float(np.mean(np.roll(shape, tonic) * centred))
            if best is None or correlation > best.correlation:
                best = Key(tonic=tonic, mode=mode, correlation=correlation)
    return best
