"""Train the sheet reader: bars and chords from the codes of a vocal, by the written scores of a corpus.

Run: python -m duotok.recipes.lm.train_sheet_reader recipes/lm/train_sheet_reader/small.yaml \\
         --out runs/small/sheet
"""

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from duotok.lm.sheet.columns import CHORD, METER, METERS, PLACE, UNKNOWN
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.recipes.lm.score_singing import CodeSinger, ScoreWindows
from duotok.recipes.lm.sheets import SheetLabels, measure_agreement
from duotok.recipes.lm.tokens import TokenShards, TokenSong, check_tokens, split_songs
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer

_VALIDATION_ITEMS = 40
_NEIGHBOURS = 8  # codes that a code may be taken for


@dataclass(frozen=True, kw_only=True)
class SheetDataConfig:
    """Which windows are read."""

    tokens: str  # folder of duotok.recipes.lm.tokenize
    manifest: str  # of the same items, with their scores
    hold_out: float = 0.0  # share of the songs never trained on, for validation
    seconds: tuple[tuple[float, float], ...] = ((30.0, 3.0), (10.0, 1.0))  # of windows, and their shares
    stretch: float = 0.15  # windows are read at tempi up to so much slower or faster
    hidden: float = 0.5  # share of the windows of which some frames are hidden, up to half of them
    confused: float = 0.5  # share of the windows of which some codes are near ones, up to half of them
    # [folder or archive of scores, share of the windows]: their training songs, sung by the tokens' codes.
    scores: tuple[tuple[str, float], ...] = ()
    score_cache: str | None = None  # folder of what was read of MusicXML

    def __post_init__(self) -> None:
        if not self.seconds or any(length <= 0 or share < 0 for length, share in self.seconds):
            raise ConfigError("data.seconds must be a list of [seconds, share], seconds above 0")
        if not 0 <= self.stretch < 1 or not 0 <= self.hold_out < 1:
            raise ConfigError("data.stretch and data.hold_out must be in [0, 1)")
        if not 0 <= self.hidden <= 1 or not 0 <= self.confused <= 1:
            raise ConfigError("data.hidden and data.confused must be in [0, 1]")
        if any(share < 0 for _, share in self.scores) or sum(share for _, share in self.scores) > 1:
            raise ConfigError("data.scores must be a list of [path, share], shares of 1 together at most")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. What the model must know of the tokenizer is taken from it."""

    tokenizer: str  # folder of the tokenizer that made the tokens
    data: SheetDataConfig
    start_from: str | None = None  # a trained reader to go on from, instead of a new one
    model: SheetReaderConfig = field(default_factory=SheetReaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    tokenizer = DuoTokenizer.from_pretrained(config.tokenizer)
    shards = TokenShards(config.data.tokens)
    check_tokens(shards, str(tokenizer.fingerprint))
    if config.start_from is None:
        reader = SheetReader.for_tokenizer(tokenizer, config.model)
    else:
        reader = SheetReader.from_pretrained(config.start_from)
        if reader.tokenizer_fingerprint != tokenizer.fingerprint:
            raise DataError(f"the reader {config.start_from} is for another tokenizer; begin a new one")
        meters = tuple(sorted({*reader.config.meters, *config.model.meters}))
        if meters != reader.config.meters:
            reader = reader.learn_meters(meters)
    trained, held_out = split_songs(shards.index.songs, config.data.hold_out)
    labels = SheetLabels.of_tokens(config.data.manifest, shards)
    source = SheetWindows(shards, labels, trained, config.data, config.train.batch_size, reader)

    def validate(process: int, processes: int) -> Figures:
        songs = ((shards.codes(song)["vocal"], labels.cut(song.id, 0, song.frames)) for song in held_out)
        shares = measure_agreement(reader, itertools.islice(songs, _VALIDATION_ITEMS))
        return {name: (share, 1.0) for name, share in shares.items()}  # small: each process measures all

    return Task(
        objective=SheetObjective(reader),
        make_batch=source.make_batch,
        export=reader.save_pretrained,
        validate=validate if held_out else None,
        count_units=lambda batch: batch["codes"].numel(),
    )


class SheetWindows:
    """Draws stretched windows of vocals, and of scores that are sung by their codes, with written sheets."""

    def __init__(
        self,
        shards: TokenShards,
        labels: SheetLabels,
        songs: Sequence[TokenSong],
        config: SheetDataConfig,
        batch_size: int,
        reader: SheetReader,
    ) -> None:
        self._shards, self._labels, self._config, self._pad = shards, labels, config, reader.pad
        self._songs, self._batch_size = songs, batch_size
        self._rate_hz = shards.index.frame_rate_hz
        vectors = reader.vectors[:-1]
        count = min(_NEIGHBOURS, len(vectors))
        self._near = torch.cdist(vectors, vectors).topk(count, largest=False).indices  # the first: itself
        self._scores: list[ScoreWindows] = []
        if config.scores:
            singer = CodeSinger(shards, labels.items, songs)
            for path, _ in config.scores:
                cache = None if config.score_cache is None else Path(config.score_cache)
                self._scores.append(ScoreWindows(open_songs(path, cache), singer, self._rate_hz))

    def make_batch(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return {"codes": [batch, frames], "sheet": [batch, frames, COLUMNS]}; longer windows are fewer."""
        lengths, shares = zip(*self._config.seconds, strict=True)
        seconds = lengths[int(rng.choice(len(lengths), p=[share / sum(shares) for share in shares]))]
        frames = max(2, round(seconds * self._rate_hz))
        size = max(1, round(self._batch_size * max(lengths) / seconds))
        rows = [self._draw(rng, frames) for _ in range(size)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _draw(self, rng: np.random.Generator, frames: int) -> dict[str, Tensor]:
        number = int(
            np.searchsorted(np.cumsum([share for _, share in self._config.scores]), rng.random(), "right")
        )
        if number < len(self._scores):
            drawn = self._scores[number].draw(rng, frames, self._config.stretch)
            codes, sheet = (torch.from_numpy(each).long() for each in drawn)
            inside = torch.ones(frames, dtype=torch.bool)
        else:
            codes, sheet, inside = self._cut(rng, frames)
        if rng.random() < self._config.confused:
            confused = torch.from_numpy(rng.random(frames) < rng.uniform(0, 0.5))
            others = torch.from_numpy(rng.integers(self._near.shape[1], size=frames))
            codes = torch.where(confused, self._near[codes, others], codes)
        share = rng.uniform(0, 0.5) if rng.random() < self._config.hidden else 0.0
        shown = inside & torch.from_numpy(rng.random(frames) >= share)
        return {"codes": torch.where(shown, codes, self._pad), "sheet": sheet}

    def _cut(self, rng: np.random.Generator, frames: int) -> tuple[Tensor, Tensor, Tensor]:
        """A stretched window of an item: its codes, its sheet, and which of the frames lie in it."""
        song = self._songs[int(rng.integers(len(self._songs)))]
        codes = self._shards.codes(song)["vocal"]
        sheet = self._labels.cut(song.id, 0, len(codes))
        speed = float(np.exp(rng.uniform(-1, 1) * np.log1p(self._config.stretch)))
        start = int(rng.integers(max(1, len(codes) - round(frames * speed) + 1)))
        places = torch.from_numpy((start + (np.arange(frames) + 0.5) * speed).astype(np.int64))
        inside = places < len(codes)
        places = places.clamp(max=len(codes) - 1)
        return codes[places].long(), torch.where(inside[:, None], sheet[places], UNKNOWN), inside


class SheetObjective(nn.Module):
    """Cross-entropy of place and chord of every frame of which they are known; of the meter, where it is."""

    def __init__(self, reader: SheetReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(self, codes: Tensor, sheet: Tensor) -> dict[str, Tensor]:
        """codes [batch, frames], sheet [batch, frames, COLUMNS] -> named losses in nats, and accuracies."""
        told = self.reader(codes)
        place, meter, chord = (sheet[..., column] for column in (PLACE, METER, CHORD))
        at_place = told["place"].gather(
            -1, place.clamp_min(0)[..., None, None].expand(-1, -1, len(METERS), -1)
        )
        at_place = at_place[..., 0]  # [batch, frames, METERS]
        at_meter = at_place.gather(-1, meter.clamp_min(0)[..., None])[..., 0]
        judged = torch.where(meter == UNKNOWN, at_place.logsumexp(dim=-1), at_meter)
        losses = {}
        for name, nats, found, right in (
            ("place", -judged, told["place"].detach().logsumexp(dim=2).argmax(dim=-1), place),
            (
                "chord",
                -told["chord"].gather(-1, chord.clamp_min(0)[..., None])[..., 0],
                told["chord"].detach().argmax(dim=-1),
                chord,
            ),
        ):
            known = (right != UNKNOWN) & torch.isfinite(nats)  # a meter that is not learned is left out
            count = known.sum().clamp_min(1)
            losses[f"{name}_nats"] = torch.where(known, nats, 0.0).sum() / count
            losses[f"{name}_accuracy"] = ((found == right) & known).sum() / count
        return {"total": losses["place_nats"] + losses["chord_nats"], **losses}


main = recipe_main("Train the sheet reader", Config, build)

if __name__ == "__main__":
    sys.exit(main())
