"""Learn to read the notes of a band out of accompaniment codes, by what the corpus knows that it played.

Run: python -m duotok.recipes.tokenizer.train_score_reader CONFIG.yaml --out runs/small/score
The result, runs/small/score/final, goes into a bundle by `--score-reader`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.tokens import TokenShards, TokenSong, check_tokens, split_songs
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.music.score_reader import (
    COLUMNS,
    DRUM_COLUMNS,
    ONSET_STEPS,
    PITCHES,
    STEM_COLUMNS,
    STEPS_PER_FRAME,
    Note,
    Score,
    ScoreReader,
    ScoreReaderConfig,
    column_of,
    find_notes,
)

ONSET_TOLERANCE_SECONDS = 0.05
_ONSET_WEIGHT = 3.0  # of what is struck over what is not
# Of the losses: what sounds is easier to learn than when it was struck, and has more to be learned.
_LOSS_WEIGHTS = {"onset_nats": 2.0, "frame_nats": 1.0, "velocity_nats": 0.5}
_THRESHOLDS = np.arange(0.1, 0.6, 0.05)  # that are tried
_VALIDATION_ITEMS, _FITTED_ITEMS = 8, 40


@dataclass(frozen=True, kw_only=True)
class ScoreDataConfig:
    """Where the bands come from."""

    manifest: str  # with the notes that the bands play
    tokenizer: str  # tokenizer folder
    tokens: str  # shards that this tokenizer made of the manifest (duotok.recipes.lm.tokenize)
    items: int = 10_000  # at most, the first of the shards: each costs as much as three of its windows
    hold_out: float = 0.0  # share of the songs never trained on, for validation and thresholds
    seconds: float = 10.0  # of a window

    def __post_init__(self) -> None:
        if self.items < 1:
            raise ConfigError(f"data.items must be at least 1, got {self.items}")
        if not 0 <= self.hold_out < 1 or not self.seconds > 0:
            raise ConfigError("data.hold_out must be in [0, 1), data.seconds above 0")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the score reader's training; what it must know of the tokenizer is taken from that."""

    data: ScoreDataConfig
    model: ScoreReaderConfig = field(default_factory=ScoreReaderConfig)
    train: TrainConfig = field(default_factory=TrainConfig)


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    tokenizer = DuoTokenizer.from_pretrained(config.data.tokenizer)
    shards = TokenShards(config.data.tokens)
    check_tokens(shards, str(tokenizer.fingerprint))
    bands = {item.id: score_of(item) for item in read_manifest(config.data.manifest) if item.band}
    songs = [song for song in shards.index.songs if song.id in bands]
    trained, fitted, _ = split_three_ways(songs[: config.data.items], config.data.hold_out)
    if not trained:
        raise DataError(f"no item of {config.data.manifest} with the notes of a band is in {shards.folder}")
    sizes = {"feature_dim": tokenizer.dim, "frame_rate_hz": tokenizer.frame_rate_hz}
    reader = ScoreReader(replace(config.model, **sizes))
    reader.tokenizer_fingerprint = tokenizer.fingerprint
    source = ScoreWindows(tokenizer, shards, trained, bands, config.data, config.train.batch_size)

    few = trained[:: -(-len(trained) // _FITTED_ITEMS)]
    reader.fit_input(torch.cat([source.features(song) for song in few]))

    def listen(songs: Sequence[TokenSong]) -> list[tuple[dict[str, np.ndarray], Score]]:
        return [(reader.listen(source.features(song)), bands[song.id]) for song in songs]

    def validate(process: int, processes: int) -> Figures:
        # On every process all of them: thresholds are fitted to the whole.
        heard = listen(fitted[:: -(-len(fitted) // _VALIDATION_ITEMS)])
        scores = measure(heard, fit_thresholds(heard, reader.rate_hz), reader.rate_hz)
        return {name: (score, 1.0) for name, score in scores.items()}

    def export(folder: Path) -> None:
        finished = ScoreReader(reader.config)
        finished.load_state_dict({name: tensor.cpu() for name, tensor in reader.state_dict().items()})
        finished.tokenizer_fingerprint = reader.tokenizer_fingerprint
        if fitted:
            reader.eval()
            finished.thresholds[:] = torch.tensor(
                fit_thresholds(listen(fitted[:_FITTED_ITEMS]), reader.rate_hz)
            )
        finished.save_pretrained(
            folder, half=True, extra={"songs": len(trained), "hold_out": config.data.hold_out}
        )

    return Task(
        objective=ScoreObjective(reader),
        make_batch=source.make_batch,
        export=export,
        validate=validate if fitted else None,
        unit="steps",
        count_units=lambda batch: batch["onsets"].shape[0] * batch["onsets"].shape[1],
    )


def split_three_ways(
    songs: Sequence[TokenSong], hold_out: float
) -> tuple[list[TokenSong], list[TokenSong], list[TokenSong]]:
    """What is trained on, what thresholds are chosen by, and what nothing is, for a test; by whole songs."""
    trained, held_out = split_songs(songs, hold_out)
    untouched, fitted = split_songs(held_out, hold_out / 2)
    return trained, fitted, untouched


def score_of(item: Item) -> Score:
    """The notes of an item's band, as a reader can tell them: what is struck twice at once is struck once."""
    score: dict[str, list[Note]] = {}
    for stem in STEM_COLUMNS:
        notes: list[Note] = []
        last: dict[int, int] = {}  # column -> where its last note is
        for start, end, pitch, velocity in sorted(
            note for *_, part in item.band.get(stem, ()) for note in part
        ):
            column = column_of(stem, pitch)
            if column is None or start >= item.seconds:
                continue
            note = Note(start, max(end, start), int(PITCHES[column]), velocity)
            if column in last and start - notes[last[column]].start < ONSET_TOLERANCE_SECONDS:
                before = notes[last[column]]
                louder = max(velocity, before.velocity)
                notes[last[column]] = before._replace(end=max(before.end, end), velocity=louder)
            else:
                last[column] = len(notes)
                notes.append(note)
        score[stem] = notes
    return score


class ScoreWindows:
    """Draws windows of accompaniments' features with what is played in them."""

    def __init__(
        self,
        tokenizer: DuoTokenizer,
        shards: TokenShards,
        songs: Sequence[TokenSong],
        bands: Mapping[str, Score],
        config: ScoreDataConfig,
        batch_size: int,
    ) -> None:
        self._tokenizer, self._shards, self._songs = tokenizer, shards, songs
        self._batch_size = batch_size
        self._frames = max(1, round(config.seconds * tokenizer.frame_rate_hz))
        self._rate_hz = STEPS_PER_FRAME * tokenizer.frame_rate_hz
        self._notes = {song.id: _as_arrays(bands[song.id], self._rate_hz) for song in songs}
        self._features: dict[str, Tensor] = {}

    def features(self, song: TokenSong) -> Tensor:
        """Return the features [frames, dim] of a song's accompaniment, computed once."""
        if song.id not in self._features:
            codes = self._shards.codes(song)["accompaniment"]
            self._features[song.id] = self._tokenizer.features(codes[None], "accompaniment")[0]
        return self._features[song.id]

    def make_batch(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return features [batch, frames, dim] and onsets, frames, velocities [batch, steps, ...]."""
        rows = [self._draw(rng) for _ in range(self._batch_size)]
        return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}

    def _draw(self, rng: np.random.Generator) -> dict[str, Tensor]:
        song = self._songs[int(rng.integers(len(self._songs)))]
        start = int(rng.integers(max(1, song.frames - self._frames + 1)))
        features = self.features(song)[start : start + self._frames]
        features = functional.pad(features, (0, 0, 0, self._frames - len(features)))
        steps = STEPS_PER_FRAME * self._frames
        return {"features": features, **draw_targets(self._notes[song.id], STEPS_PER_FRAME * start, steps)}


def _as_arrays(score: Score, rate_hz: float) -> np.ndarray:
    """Notes [notes, 4]: column, start and end in steps, velocity in 0 to 1."""
    rows = [
        (column_of(stem, note.pitch), note.start * rate_hz, note.end * rate_hz, note.velocity / 127)
        for stem, notes in score.items()
        for note in notes
    ]
    return np.array(rows, dtype=float).reshape(-1, 4)


def draw_targets(notes: np.ndarray, first: int, steps: int) -> dict[str, Tensor]:
    """What is played from step `first` on, of notes [notes, 4]: onsets, frames, velocities [steps, ...]."""
    onsets, velocities = np.zeros((2, steps, COLUMNS), dtype=np.float32)
    edges = np.zeros((steps + 1, COLUMNS - DRUM_COLUMNS))
    notes = notes[(notes[:, 2] > first - ONSET_STEPS) & (notes[:, 1] < first + steps + ONSET_STEPS)]
    columns, begin, end = notes[:, 0].astype(int), notes[:, 1] - first, notes[:, 2] - first
    reach = int(np.ceil(ONSET_STEPS))
    for shift in range(-reach, reach + 1):
        step = np.floor(begin).astype(int) + shift
        height = 1 - np.abs(step + 0.5 - begin) / ONSET_STEPS
        inside = (step >= 0) & (step < steps) & (height > 0)
        where = step[inside], columns[inside]
        np.maximum.at(onsets, where, height[inside])
        np.maximum.at(velocities, where, notes[inside, 3])
    pitched = columns >= DRUM_COLUMNS
    low = np.ceil(begin - 0.5).astype(int)
    high = np.maximum(np.ceil(end - 0.5).astype(int), low + 1)
    np.add.at(edges, (low[pitched].clip(0, steps), columns[pitched] - DRUM_COLUMNS), 1)
    np.add.at(edges, (high[pitched].clip(0, steps), columns[pitched] - DRUM_COLUMNS), -1)
    frames = (edges.cumsum(axis=0)[:steps] > 0).astype(np.float32)
    found = {"onsets": onsets, "frames": frames, "velocities": velocities}
    return {name: torch.from_numpy(values) for name, values in found.items()}


class ScoreObjective(nn.Module):
    """Cross-entropies of onsets, of sounding pitches, and of velocities where something is struck."""

    def __init__(self, reader: ScoreReader) -> None:
        super().__init__()
        self.reader = reader

    def forward(
        self, features: Tensor, onsets: Tensor, frames: Tensor, velocities: Tensor
    ) -> dict[str, Tensor]:
        """See `ScoreWindows.make_batch` -> named losses in nats per step."""
        told, steps = self.reader(features), onsets.shape[0] * onsets.shape[1]
        cross_entropy = functional.binary_cross_entropy_with_logits
        weights = 1 + (_ONSET_WEIGHT - 1) * onsets
        nats = {
            "onset_nats": cross_entropy(told["onset"], onsets, weights, reduction="sum") / steps,
            "frame_nats": cross_entropy(told["frame"], frames, reduction="sum") / steps,
            "velocity_nats": cross_entropy(
                told["velocity"], velocities, (onsets > 0.5).float(), reduction="sum"
            )
            / steps,
        }
        weighted = [_LOSS_WEIGHTS[name] * loss for name, loss in nats.items()]
        return {"total": torch.stack(weighted).sum(), **nats}


Heard = Sequence[tuple[Mapping[str, np.ndarray], Score]]  # what a reader says of songs, and what is played


def measure(heard: Heard, thresholds: Sequence[float], rate_hz: float) -> dict[str, float]:
    """F-measures of onsets by stem, and of the sounding pitches of the rest, over all songs at once."""
    counts = {name: np.zeros(3) for name in (*(f"onset_f/{stem}" for stem in STEM_COLUMNS), "frame_f/other")}
    for told, true in heard:
        read = find_notes(told, thresholds, rate_hz)
        for stem in STEM_COLUMNS:
            counts[f"onset_f/{stem}"] += count_onsets(read[stem], true[stem])
        rolls = [_roll(score["other"], len(told["onset"]), rate_hz) for score in (read, true)]
        counts["frame_f/other"] += [(rolls[0] & rolls[1]).sum(), rolls[0].sum(), rolls[1].sum()]
    return {name: float(2 * hits / max(read + true, 1)) for name, (hits, read, true) in counts.items()}


def count_onsets(read: Iterable[Note], true: Iterable[Note]) -> tuple[int, int, int]:
    """Notes that are read within 50 ms of one that is played at their pitch, notes read, notes played."""
    hits = total_read = total_true = 0
    starts: tuple[dict[int, list[float]], dict[int, list[float]]] = ({}, {})
    for by_pitch, notes in zip(starts, (read, true), strict=True):
        for note in sorted(notes):
            by_pitch.setdefault(note.pitch, []).append(note.start)
    for pitch in {*starts[0], *starts[1]}:
        found, wanted = (by_pitch.get(pitch, []) for by_pitch in starts)
        total_read, total_true = total_read + len(found), total_true + len(wanted)
        here = there = 0
        while here < len(found) and there < len(wanted):  # in order, which leaves out none that can be had
            apart = round(found[here] - wanted[there], 6)
            hits += abs(apart) <= ONSET_TOLERANCE_SECONDS
            here, there = (
                here + (apart <= ONSET_TOLERANCE_SECONDS),
                there + (apart >= -ONSET_TOLERANCE_SECONDS),
            )
    return hits, total_read, total_true


def _roll(notes: Iterable[Note], steps: int, rate_hz: float) -> np.ndarray:
    rows = _as_arrays({"other": list(notes)}, rate_hz)
    return draw_targets(rows, 0, steps)["frames"].numpy() > 0


def fit_thresholds(heard: Heard, rate_hz: float) -> list[float]:
    """Return the thresholds of onsets by stem and of frames with the best F-measures."""
    tried = [measure(heard, [value] * 4, rate_hz) for value in _THRESHOLDS]
    best = [
        float(_THRESHOLDS[np.argmax([found[f"onset_f/{stem}"] for found in tried])]) for stem in STEM_COLUMNS
    ]
    frames = [measure(heard, [*best, value], rate_hz)["frame_f/other"] for value in _THRESHOLDS]
    return [*best, float(_THRESHOLDS[np.argmax(frames)])]


main = recipe_main("The score of a band from its codes", Config, build)

if __name__ == "__main__":
    sys.exit(main())
