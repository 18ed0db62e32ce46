"""Reads the lead sheet out of a vocal's codes: bars and chords that the singer has in mind.

A network of gated convolutions hears some forty seconds to each side and says of every frame how likely each
meter, each place in a bar of it and each chord is; `find_meter`, `find_time_line` and `track_chords` make a
plausible whole of it. Beside each stands the sheet trust: how far it can be relied on. Two frames share one
step: a sixteenth part of a bar lasts longer than a frame.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...tokenizer.blocks import TAPS, GatedConvolution
from ...tokenizer.common.checkpoint import Component
from ...tokenizer.common.chunks import join_chunks
from ...tokenizer.common.errors import ConfigError
from ...tokenizer.model import DuoTokenizer
from ...tokenizer.music.harmony import find_path
from ...tokenizer.music.labels import CHORDS
from .columns import BEATS_PER_BAR, METER, METERS, PLACES, UNKNOWN, WRITTEN, unknown_sheet
from .timeline import find_meter, find_time_line, places_in

_FRAMES_PER_STEP = 2
CHUNK_FRAMES = 6_000  # 4 minutes; whole steps
# Over which trust is a mean: bars are right or wrong for a while, chords each by itself.
_PLACE_REACH_SECONDS, _CHORD_REACH_SECONDS = 8.0, 2.0
_NEW_METER_NATS = -4.0
_CHORD_EVIDENCE = 0.2  # of a frame's log-probabilities: neighbouring frames say much the same
# Nats for a change of chord where a quarter of a bar begins, and anywhere else.
_QUARTER_COSTS, _OTHER_COST = np.array([3.0, 6.0, 4.0, 6.0]), 20.0


@dataclass(frozen=True, kw_only=True)
class SheetReaderConfig:
    """Settings of the reader."""

    vocal_codes: int = 32_768
    code_dim: int = 64  # width of the tokenizer's code vectors
    frame_rate_hz: float = 25.0
    dim: int = 96
    dilations: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 1, 2, 4, 8, 16, 32, 64)
    dropout: float = 0.1
    meters: tuple[int, ...] = (BEATS_PER_BAR,)  # that it has learned, in beats of a bar

    def __post_init__(self) -> None:
        if min(self.vocal_codes, self.code_dim, self.dim, *self.dilations) < 1 or not self.frame_rate_hz > 0:
            raise ConfigError("the sheet reader's sizes, dilations and frame rate must be above 0")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"the sheet reader's dropout must be in [0, 1), got {self.dropout}")
        if not self.meters or not set(self.meters) <= set(METERS) or len(set(self.meters)) < len(self.meters):
            raise ConfigError(f"the sheet reader's meters must be some of {METERS}, got {self.meters}")


class SheetReader(Component[SheetReaderConfig]):
    """Place in the bar and chord of every frame of a vocal."""

    KIND = "sheet-reader"
    CONFIG = SheetReaderConfig
    STORED = ("tokenizer_fingerprint",)

    vectors: Tensor

    def __init__(self, config: SheetReaderConfig) -> None:
        super().__init__(config)
        self.tokenizer_fingerprint: str | None = None
        self.register_buffer("vectors", torch.zeros(config.vocal_codes + 1, config.code_dim))  # the last: PAD
        self.anchor = nn.Linear(config.code_dim, config.dim)
        self.residual = nn.Embedding(config.vocal_codes + 1, config.dim)
        nn.init.normal_(self.residual.weight, std=0.1)
        self.join = nn.Linear(_FRAMES_PER_STEP * config.dim, config.dim)
        self.blocks = nn.ModuleList(GatedConvolution(config.dim, d, config.dropout) for d in config.dilations)
        self.norm = nn.LayerNorm(config.dim)
        self.heads = nn.Linear(config.dim, _FRAMES_PER_STEP * (len(config.meters) * PLACES + CHORDS))

    @classmethod
    def for_tokenizer(cls, tokenizer: DuoTokenizer, config: SheetReaderConfig) -> "SheetReader":
        """Return a new reader of a tokenizer's vocal codes."""
        vectors = tokenizer.code_vectors("vocal").float()
        vectors = (vectors - vectors.mean(dim=0)) / vectors.std(dim=0).clamp_min(1e-6)
        sizes = dict(vocal_codes=len(vectors), code_dim=vectors.shape[1])
        reader = cls(replace(config, **sizes, frame_rate_hz=tokenizer.frame_rate_hz))
        reader.vectors[:-1] = vectors
        reader.tokenizer_fingerprint = tokenizer.fingerprint
        return reader

    def learn_meters(self, meters: Sequence[int]) -> "SheetReader":
        """Return a reader that hears as this one does and tells of more meters, new ones seldom at first."""
        reader = SheetReader(replace(self.config, meters=tuple(meters)))
        weights = {name: value for name, value in self.state_dict().items() if not name.startswith("heads.")}
        reader.load_state_dict(weights, strict=False)
        reader.tokenizer_fingerprint = self.tokenizer_fingerprint
        own, new = self._head_rows(), reader._head_rows()
        with torch.no_grad():
            for name, first in (("weight", 0.0), ("bias", _NEW_METER_NATS)):
                known, rows = (
                    getattr(each.heads, name).unflatten(0, (_FRAMES_PER_STEP, -1)) for each in (self, reader)
                )
                for what, where in new.items():
                    rows[:, where] = known[:, own[what]] if what in own else first
        return reader

    def _head_rows(self) -> dict[str, slice]:
        """Which outputs of a frame say what."""
        rows = {
            f"in {beats}": slice(number * PLACES, (number + 1) * PLACES)
            for number, beats in enumerate(self.config.meters)
        }
        return {**rows, "chord": slice(-CHORDS, None)}

    @property
    def pad(self) -> int:
        """The code that stands for a hidden frame."""
        return self.config.vocal_codes

    def forward(self, codes: Tensor) -> dict[str, Tensor]:
        """Codes [batch, frames], with PAD -> log-probabilities on their device.

        "place" [batch, frames, METERS, PLACES] of the meter and the place in its bar, -inf of meters that it
        has not learned; "chord" [batch, frames, CHORDS].
        """
        batch, frames = codes.shape
        codes = functional.pad(codes, (0, -frames % _FRAMES_PER_STEP), value=self.pad)
        features = self.anchor(functional.embedding(codes, self.vectors)) + self.residual(codes)
        features = self.join(features.reshape(batch, -1, _FRAMES_PER_STEP * features.shape[-1]))
        for block in self.blocks:
            features = block(features)
        logits = self.heads(self.norm(features)).float()
        logits = logits.reshape(batch, -1, logits.shape[-1] // _FRAMES_PER_STEP)[:, :frames]
        told, chord = logits.tensor_split([-CHORDS], dim=-1)
        place = torch.full((*told.shape[:2], len(METERS), PLACES), -torch.inf, device=told.device)
        learned = [METERS.index(beats) for beats in self.config.meters]
        place[:, :, learned] = told.log_softmax(dim=-1).unflatten(-1, (-1, PLACES))
        return {"place": place, "chord": chord.log_softmax(dim=-1)}

    @torch.no_grad()
    def read(self, codes: Tensor, beats_per_bar: int | None = None) -> Tensor:
        """Return the sheet [batch, frames, COLUMNS] of codes [batch, frames]; unknown where all are PAD.

        beats_per_bar: of METERS; None: each row's own, as it is heard.
        """
        told = {name: value.numpy() for name, value in self.listen(codes).items()}
        place_reach = round(_PLACE_REACH_SECONDS * self.config.frame_rate_hz)
        chord_reach = round(_CHORD_REACH_SECONDS * self.config.frame_rate_hz)
        sheets = unknown_sheet(*codes.shape)
        for row in torch.nonzero((codes != self.pad).any(dim=1))[:, 0].tolist():
            rate_hz = self.config.frame_rate_hz
            beats = beats_per_bar or find_meter(told["place"][row], rate_hz)
            place = places_in(told["place"][row], beats)
            places = find_time_line(place, rate_hz, beats_per_bar=beats).places(codes.shape[1])
            chords = track_chords(told["chord"][row], places)
            trusts = (
                measure_trust(place, places, place_reach),
                measure_trust(told["chord"][row], chords, chord_reach),
            )
            sheets[row, :, :METER] = torch.from_numpy(np.stack([places, chords, *trusts], axis=-1))
        return sheets.to(codes.device)

    @torch.no_grad()
    def listen(self, codes: Tensor) -> dict[str, Tensor]:
        """What `forward` says of codes of any length, in bounded memory, on the CPU."""

        def compute(low: int, high: int) -> Tensor:
            return torch.cat([each.flatten(2) for each in self(codes[:, low:high]).values()], dim=-1)

        halo = _FRAMES_PER_STEP * (TAPS // 2) * sum(self.config.dilations)
        told = join_chunks(codes.shape[1], compute, size=CHUNK_FRAMES, halo=halo)
        place, chord = told.cpu().tensor_split([-CHORDS], dim=-1)
        return {"place": place.unflatten(-1, (len(METERS), PLACES)), "chord": chord}


def track_chords(log_probabilities: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return the chord of each frame [frames]; they change where bands change them, at beats.

    log_probabilities: [frames, CHORDS]. places: [frames], the frame's place in the bar.
    """
    quarters = places * 4 // PLACES
    begins = np.diff(quarters, prepend=quarters[:1]) != 0
    costs = np.where(begins, _QUARTER_COSTS[quarters], _OTHER_COST)
    return find_path(_CHORD_EVIDENCE * log_probabilities, costs)


def measure_trust(log_probabilities: np.ndarray, chosen: np.ndarray, reach_frames: int) -> np.ndarray:
    """Return sheet trust, levels [frames] in 0..WRITTEN - 1 of choices [frames]; UNKNOWN where they are.

    log_probabilities: [frames, choices]. The level is the share of the choice's information that the reader
    had, log(choices x chance) / log(choices), as a mean over reach_frames around: 0 where it guessed or was
    of another opinion.
    """
    frames, choices = log_probabilities.shape
    is_known = chosen != UNKNOWN
    told = 1 + log_probabilities[np.arange(frames), chosen] / np.log(choices)
    sums = np.stack([np.concatenate([[0.0], (row * is_known).cumsum()]) for row in (told, np.ones(frames))])
    first = (np.arange(frames) - reach_frames // 2).clip(0)
    last = (np.arange(frames) + reach_frames // 2 + 1).clip(max=frames)
    total, count = sums[:, last] - sums[:, first]
    levels = np.floor(total / np.maximum(count, 1) * WRITTEN).astype(np.int64).clip(0, WRITTEN - 1)
    return np.where(is_known, levels, UNKNOWN)
