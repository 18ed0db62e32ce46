"""Train one of AccompGen's three stages on token shards (arXiv 2604.09054).

Run: python -m duotok.recipes.lm.accompgen.train_stage recipes/lm/accompgen/small.yaml \\
         --set stage=semantic --out runs/small/accompgen/semantic
and likewise with stage=coarse and stage=fine; `join_stages` makes one language model of the three.
Validation says how predictable held-out songs are, in bits per token: from the source, from nothing, from
another song's source; beside what the frequencies of the training songs' codes alone tell.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.lm.hierarchical.model import STAGES, scale_streams
from duotok.lm.hierarchical.stage import Stage, StageConfig, StageObjective
from duotok.lm.metrics import code_counts, nats_to_bits, unigram_bits
from duotok.recipes.lm.accompgen.layered_tokens import LayeredShards
from duotok.recipes.lm.tokens import TokenSong, split_songs
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError

_OVERLAP = 0.2  # of a window, that the next one continues
_SONGS_COUNTED = 500  # of which the frequencies of codes are taken
_ROWS = 4  # windows that are measured at once
_SONG_STARTS = 0.1  # of the windows begin with their song, as every accompaniment does


@dataclass(frozen=True, kw_only=True)
class StageDataConfig:
    """Which windows are drawn."""

    tokens: str  # folder of layered_tokens
    hold_out: float = 0.0  # share of the songs never trained on, for validation
    source_dropout: float = 0.1  # of the windows are told no source, for classifier-free guidance
    # Seconds of a window of each stage
    windows: dict[str, float] = field(default_factory=lambda: {"semantic": 10.0, "coarse": 5.0, "fine": 3.0})
    validation_windows: int = 16

    def __post_init__(self) -> None:
        if not 0 <= self.hold_out < 1 or not 0 <= self.source_dropout <= 1 or self.validation_windows < 1:
            raise ConfigError(
                "data.hold_out and data.source_dropout must be in 0..1, data.validation_windows above 0"
            )
        if sorted(self.windows) != sorted(STAGES) or min(self.windows.values()) <= 0:
            raise ConfigError(f"data.windows must give seconds above 0 for each of {', '.join(STAGES)}")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. Rates and codebooks of the model are those of the tokens."""

    data: StageDataConfig
    stage: str = "semantic"  # or coarse, fine
    coarse_levels: int = (
        4  # codebooks of the codec that the coarse stage writes; the fine one writes the rest
    )
    model: StageConfig = field(default_factory=StageConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    shards = LayeredShards(config.data.tokens)
    stage = build_stage(config, shards)
    trained, held_out = split_songs(shards.index.songs, config.data.hold_out)
    windows = StageWindows(shards, trained, stage, config.coarse_levels)

    def make_batch(rng: np.random.Generator) -> dict[str, Tensor]:
        pairs = [windows.draw(rng) for _ in range(config.train.batch_size)]
        source, target = (torch.stack(each) for each in zip(*pairs, strict=True))
        known = torch.from_numpy(rng.random(len(pairs)) >= config.data.source_dropout)
        return {"source": source, "target": target, "known": known}

    return Task(
        objective=StageObjective(stage),
        make_batch=make_batch,
        export=stage.save_pretrained,
        validate=None
        if not held_out
        else make_validation(config, shards, held_out, stage, windows.count_codes()),
        count_units=lambda batch: batch["target"].numel(),
    )


def build_stage(config: Config, shards: LayeredShards) -> Stage:
    """Return a new stage for the tokens."""
    seconds = config.data.windows[config.stage] if config.stage in STAGES else 1.0
    settings = replace(config.model, window_seconds=seconds, overlap_seconds=_OVERLAP * seconds)
    index = shards.index
    streams = {"semantic": index.semantic, "codec": index.codec, "coarse_levels": config.coarse_levels}
    stage = Stage(scale_streams(settings, config.stage, **streams))
    stage.stage = config.stage
    stage.semantic_fingerprint, stage.codec_fingerprint = index.semantic_fingerprint, index.codec_fingerprint
    return stage


class StageWindows:
    """Windows of what a stage hears and writes, cut from songs."""

    def __init__(
        self, shards: LayeredShards, songs: Sequence[TokenSong], stage: Stage, coarse_levels: int
    ) -> None:
        self._shards, self._config, self._name, self._coarse = (
            shards,
            stage.config,
            stage.stage,
            coarse_levels,
        )
        rate_hz, seconds = shards.index.semantic.rate_hz, stage.config.window_seconds
        self._frames = max(1, round(seconds * rate_hz))
        self.songs = [song for song in songs if song.frames >= self._frames]
        if not self.songs:
            raise DataError(
                f"no song in {shards.folder} has {seconds:g} s; lower data.windows.{stage.stage} or change "
                "data.hold_out"
            )
        # Every frame is as likely as any other, so long songs are drawn more often.
        shares = np.array([song.frames for song in self.songs], dtype=np.float64)
        self._shares = shares / shares.sum()
        # Windows begin where frames of both rates do, if there are such places.
        ratio = shards.index.codec.rate_hz / rate_hz
        self._grid = next((grid for grid in range(1, 9) if abs(grid * ratio % 1) < 1e-6), 1)

    def draw(self, rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """Return source and target codes [levels, frames] of a random window."""
        song = self.songs[int(rng.choice(len(self.songs), p=self._shares))]
        return self.cut(song, 0.0 if rng.random() < _SONG_STARTS else float(rng.random()))

    def cut(self, song: TokenSong, share: float) -> tuple[Tensor, Tensor]:
        """Return the same of the window of a song that begins at a share of where it may."""
        start = int(share * (1 + (song.frames - self._frames) // self._grid)) * self._grid
        start_seconds = start / self._shards.index.semantic.rate_hz
        parts = []
        for stream, row in zip((self._config.source, self._config.target), self._rows(song), strict=True):
            first = int(start_seconds * stream.rate_hz + 1e-6)
            frames = max(1, round(self._config.window_seconds * stream.rate_hz))
            part = row[:, first : first + frames]
            # A codec's last frame may be missing where a song ends in the middle of one.
            parts.append(functional.pad(part[None].float(), (0, frames - part.shape[1]), mode="replicate")[0])
        return parts[0].long(), parts[1].long()

    def count_codes(self) -> Tensor:
        """Return how often each code of the target comes in some of the songs, [levels, codes]."""
        stream, songs = self._config.target, self.songs[:: math.ceil(len(self.songs) / _SONGS_COUNTED)]
        targets = [self._rows(song)[1] for song in songs]
        rows = [torch.cat([each[k] for each in targets]) for k in range(stream.levels)]
        return torch.stack([code_counts(row, stream.codebook_size) for row in rows])

    def _rows(self, song: TokenSong) -> tuple[Tensor, Tensor]:
        """Source and target codes [levels, frames] of a whole song."""
        codes = self._shards.codes(song)
        acoustic = codes["acoustic"]
        streams = (codes["vocal"], codes["semantic"], acoustic[: self._coarse], acoustic[self._coarse :])
        place = STAGES.index(str(self._name))
        return streams[place], streams[place + 1]


def make_validation(
    config: Config, shards: LayeredShards, songs: Sequence[TokenSong], stage: Stage, counts: Tensor
) -> Callable[[int, int], Figures]:
    """Return the function that measures the stage as it is then on fixed windows of held-out songs."""
    windows = StageWindows(shards, songs, stage, config.coarse_levels)
    count = config.data.validation_windows
    ordered = sorted(windows.songs, key=lambda song: (song.fraction("window"), song.id))
    chosen = [(ordered[k % len(ordered)], k // len(ordered)) for k in range(count)]
    pairs = [windows.cut(song, (song.fraction("start") + 0.37 * turn) % 1.0) for song, turn in chosen]
    source, target = (torch.stack(each) for each in zip(*pairs, strict=True))

    def validate(process: int, processes: int) -> Figures:
        was_training = stage.training
        stage.eval()
        try:
            # On every process all windows: each is compared with one far from it.
            bits = measure_stage(stage, source, target, counts)
            return {name: (value, 1.0) for name, value in bits.items()}
        finally:
            stage.train(was_training)

    return validate


@torch.no_grad()
def measure_stage(
    stage: Stage, source: Tensor, target: Tensor, counts: Tensor | None = None
) -> dict[str, float]:
    """Bits per token of windows [windows, levels, frames]: heard, alone, with another window's source.

    …/unigram, with the counts [levels, codes] of other songs: what these alone tell, which a model that has
    learned anything beats.
    """
    known = torch.ones(_ROWS, dtype=torch.bool)
    other = source.roll(len(source) // 2, 0)  # neighbours may be of one song
    cases = {"heard": (source, known), "alone": (source, ~known), "mismatched": (other, known)}
    objective, figures = StageObjective(stage), {}
    for name, (heard, told) in cases.items():
        nats = 0.0
        for first in range(0, len(target), _ROWS):
            part = target[first : first + _ROWS].to(stage.device)
            given = heard[first : first + _ROWS].to(stage.device)
            nats += float(objective(given, part, told[: len(part)].to(stage.device))["total"]) * len(part)
        figures[f"bits_per_token/{name}"] = nats_to_bits(nats / len(target))
    if counts is not None:
        bits = [unigram_bits(target[:, k], each) for k, each in enumerate(counts)]
        figures["bits_per_token/unigram"] = sum(bits) / len(bits)
    return figures


main = recipe_main("Train one of AccompGen's three stages", Config, build)

if __name__ == "__main__":
    sys.exit(main())
