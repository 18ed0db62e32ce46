"""Reads the score of a band out of the features of its codes: which notes are struck, how long, how loud.

A small network of gated convolutions says of every step of 20 ms which drums and pitches are struck in it and
which pitches sound (C. Hawthorne et al., Onsets and Frames: Dual-Objective Piano Transcription, 2018). Onsets
are triangles over four steps, of which the top lies between the steps (Q. Kong et al., High-Resolution Piano
Transcription with Pedals by Regressing Onset and Offset Times, 2021).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..blocks import TAPS, GatedConvolution
from ..common.checkpoint import Component
from ..common.chunks import join_chunks
from ..common.errors import ConfigError

STEPS_PER_FRAME = 2
ONSET_STEPS = 2.0  # half the width of the triangle that an onset is
# Classes of General MIDI drum keys; each is written as its first. What is in none of them is percussion.
DRUMS = {
    "kick": (36, 35),
    "snare": (38, 37, 39, 40),
    "hats": (42, 44, 46),
    "toms": (45, 41, 43, 47, 48, 50),
    "cymbals": (51, 49, 52, 53, 55, 57, 59),
    "percussion": (70,),
}
_BASS, _OTHER = range(24, 64), range(21, 109)  # pitches that are told apart
# What the columns of onsets stand for; those of frames are the same without the drums.
STEM_COLUMNS = {"drums": slice(0, 6), "bass": slice(6, 46), "other": slice(46, 134)}
PITCHES = np.array([*(keys[0] for keys in DRUMS.values()), *_BASS, *_OTHER])  # of each column
COLUMNS, DRUM_COLUMNS = len(PITCHES), len(DRUMS)
_DRUM_SECONDS = 0.1
_LEAST_VARIANCE = 1e-4
_CHUNK_FRAMES = 6_000  # 4 minutes


class Note(NamedTuple):
    """One note; of a drum the pitch is the General MIDI key."""

    start: float  # seconds
    end: float
    pitch: int
    velocity: int  # 1 to 127


Score = Mapping[str, Sequence[Note]]  # drums, bass, other -> notes in order of their starts


def column_of(stem: str, pitch: int) -> int | None:
    """Return the column of a stem's pitch; None where it is out of reach."""
    if stem == "drums":
        found = (number for number, keys in enumerate(DRUMS.values()) if pitch in keys)
        return next(found, DRUM_COLUMNS - 1)
    pitches, columns = {"bass": _BASS, "other": _OTHER}[stem], STEM_COLUMNS[stem]
    return columns.start + pitch - pitches.start if pitch in pitches else None


@dataclass(frozen=True, kw_only=True)
class ScoreReaderConfig:
    """Settings of the reader."""

    feature_dim: int = 192  # of the tokenizer
    frame_rate_hz: float = 25.0
    dim: int = 192
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32)  # 5 s to each side: a bar or two tell of this one
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if min(self.feature_dim, self.dim, *self.dilations) < 1 or not self.frame_rate_hz > 0:
            raise ConfigError("the score reader's sizes, dilations and frame rate must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the score reader's dropout must be in [0, 1), got {self.dropout}")


class ScoreReader(Component[ScoreReaderConfig]):
    """Onsets, sounding pitches and velocities of every step of an accompaniment."""

    KIND = "score-reader"
    CONFIG = ScoreReaderConfig
    STORED = ("tokenizer_fingerprint",)

    thresholds: Tensor
    mean: Tensor
    whitening: Tensor

    def __init__(self, config: ScoreReaderConfig) -> None:
        super().__init__(config)
        self.tokenizer_fingerprint: str | None = None
        # Probabilities from which on an onset of drums, bass, other counts, and a pitch sounds.
        self.register_buffer("thresholds", torch.full((4,), 0.5))
        self.register_buffer("mean", torch.zeros(config.feature_dim))
        self.register_buffer("whitening", torch.eye(config.feature_dim))
        self.join = nn.Linear(config.feature_dim, config.dim)
        self.blocks = nn.ModuleList(GatedConvolution(config.dim, d, config.dropout) for d in config.dilations)
        self.norm = nn.LayerNorm(config.dim)
        self.split = nn.Linear(config.dim, STEPS_PER_FRAME * config.dim)
        self.heads = nn.Linear(config.dim, 3 * COLUMNS - DRUM_COLUMNS)
        with torch.no_grad():
            self.heads.bias[: 2 * COLUMNS - DRUM_COLUMNS] = -4.0  # most is silence

    @property
    def rate_hz(self) -> float:
        """Steps per second."""
        return STEPS_PER_FRAME * self.config.frame_rate_hz

    def fit_input(self, features: Tensor) -> None:
        """Make all directions of features [frames, feature_dim] such as will come equally large.

        Which drum it was lies in directions a hundredth as large as the largest: as they are, they would be
        learned late, and lost in bfloat16.
        """
        self.mean[:] = features.mean(dim=0)
        sizes, directions = torch.linalg.eigh((features - self.mean).double().T.cov())
        self.whitening[:] = directions / sizes.clamp_min(_LEAST_VARIANCE).sqrt()

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        """Features [batch, frames, feature_dim] -> logits of onset, frame, velocity [batch, steps, ...]."""
        with torch.autocast(features.device.type, enabled=False):
            features = (features.float() - self.mean) @ self.whitening
        hidden = self.join(features)
        for block in self.blocks:
            hidden = block(hidden)
        hidden = functional.gelu(self.split(self.norm(hidden)))
        hidden = hidden.reshape(len(hidden), -1, self.config.dim)  # [batch, steps, dim]
        told = self.heads(hidden).float().split([COLUMNS, COLUMNS - DRUM_COLUMNS, COLUMNS], dim=-1)
        return dict(zip(("onset", "frame", "velocity"), told, strict=True))

    @torch.no_grad()
    def listen(self, features: Tensor) -> dict[str, np.ndarray]:
        """Probabilities [steps, ...] of features [frames, feature_dim] of any length; see `forward`."""

        def compute(low: int, high: int) -> Tensor:
            return torch.cat(list(self(features[None, low:high]).values()), dim=-1).sigmoid()

        halo = (TAPS // 2) * sum(self.config.dilations)
        told = join_chunks(len(features), compute, size=_CHUNK_FRAMES, halo=halo, rate=STEPS_PER_FRAME)
        parts = told[0].cpu().split([COLUMNS, COLUMNS - DRUM_COLUMNS, COLUMNS], dim=-1)
        return {n: p.numpy() for n, p in zip(("onset", "frame", "velocity"), parts, strict=True)}

    def read(self, features: Tensor) -> Score:
        """Return the score of features [frames, feature_dim] of an accompaniment."""
        return find_notes(self.listen(features), self.thresholds.tolist(), self.rate_hz)


def find_notes(told: Mapping[str, np.ndarray], thresholds: Sequence[float], rate_hz: float) -> Score:
    """Return the notes of probabilities of onset, frame and velocity [steps, ...] at rate_hz steps a second.

    thresholds: of the onsets of drums, bass, other, and of frames. A note lasts while its pitch sounds, and
    ends where it is struck again.
    """
    from scipy.ndimage import maximum_filter1d  # as few runs need it

    onset, frame = told["onset"], told["frame"]
    needed = np.empty(COLUMNS)
    for columns, threshold in zip(STEM_COLUMNS.values(), thresholds, strict=False):
        needed[columns] = threshold
    before, after = np.pad(onset, ((1, 0), (0, 0)))[:-1], np.pad(onset, ((0, 1), (0, 0)))[1:]
    is_top = (onset > needed) & (onset > before) & (onset >= maximum_filter1d(onset, 5, axis=0))
    # The sides of a triangle are equally steep: the steeper of the two that are seen is one of them.
    steepness = np.maximum(onset - np.minimum(before, after), 1e-6)
    starts = np.arange(len(onset))[:, None] + 0.5 + ((after - before) / (2 * steepness)).clip(-0.5, 0.5)
    silent = np.where(frame < thresholds[3], np.arange(len(frame))[:, None], len(frame))
    silent = np.minimum.accumulate(silent[::-1])[::-1]  # [steps, ...] the next step without sound
    score: dict[str, list[Note]] = {}
    for stem, columns in STEM_COLUMNS.items():
        notes = []
        for column in range(columns.start, columns.stop):
            steps = np.flatnonzero(is_top[:, column])
            for step, following in zip(steps, np.append(steps, len(onset))[1:], strict=True):
                start = float(starts[step, column]) / rate_hz
                end = start + _DRUM_SECONDS
                if stem != "drums":
                    last = silent[min(step + 1, len(frame) - 1), column - DRUM_COLUMNS]
                    end = max(float(min(last, following)), step + 1.5) / rate_hz
                velocity = int(np.clip(round(127 * float(told["velocity"][step, column])), 1, 127))
                notes.append(Note(start, end, int(PITCHES[column]), velocity))
        score[stem] = sorted(notes)
    return score
