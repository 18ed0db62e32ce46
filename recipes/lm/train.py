"""Train the dual-track language model on token shards (P 5.2, B.1).

Run: python -m duotok.recipes.lm.train recipes/lm/small.yaml --out runs/small/lm
Many GPUs: accelerate launch --multi_gpu -m duotok.recipes.lm.train recipes/lm/base.yaml --out runs/base/lm

While it trains, validation tells how predictable held-out songs are, by the paper's protocol (P B.1.3, B.1.4)
on fixed windows: both tracks unconditionally, and the accompaniment from the vocal after a given prefix.
"""

import copy
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective, count_loss_parts, score_batch
from duotok.lm.metrics import codebook_normalized_bits, nats_to_bits
from duotok.lm.sheet.reader import SheetReader
from duotok.recipes.lm.data import DataConfig, WindowSource
from duotok.recipes.lm.sheets import SheetConfig, SheetLabels, SheetSource
from duotok.recipes.lm.tokens import TokenShards, TokenSong, check_tokens, split_songs
from duotok.recipes.training.recipe_command import recipe_main
from duotok.recipes.training.task import Figures, Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer

_INTO = "vocal_to_accompaniment"


@dataclass(frozen=True, kw_only=True)
class ValidationConfig:
    """Which windows training is watched on; those of data.hold_out unless `tokens` names others."""

    tokens: str | None = None  # shards of songs that are in no shard of data.tokens
    windows: int = 16  # each of another song as long as there are enough
    seconds: float | None = None  # of each window; None = the longest of data.windows
    prefix_seconds: float = 2.0  # given and not counted, vocal to accompaniment only
    rows: int = 4  # windows computed side by side

    def __post_init__(self) -> None:
        if self.windows < 1 or self.rows < 1:
            raise ConfigError("validation.windows and validation.rows must be at least 1")
        if self.prefix_seconds < 0 or (self.seconds is not None and self.seconds <= self.prefix_seconds):
            raise ConfigError("validation.seconds must exceed validation.prefix_seconds, neither be negative")


@dataclass(frozen=True, kw_only=True)
class Config:
    """Settings of the recipe. Codebook sizes and code_dim of the model are the tokenizer's."""

    tokenizer: str  # folder of the tokenizer that made the tokens
    data: DataConfig
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    start_from: str | None = None  # a trained language model to go on from, instead of a new one
    prompt_weight: float = 0.0  # weight of predicting the target from the prompt alone; see LMObjective
    sheets: SheetConfig = field(default_factory=SheetConfig)
    model: DualTrackLMConfig = field(default_factory=DualTrackLMConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.prompt_weight < 0:
            raise ConfigError("prompt_weight must not be negative")


def build(config: Config) -> Task:
    """Make the objective and its batches."""
    shards = TokenShards(config.data.tokens)
    lm = build_model(config, shards)
    sheets = None
    if lm.sheet_reader is not None:
        written = None
        if config.sheets.manifest is not None:
            written = SheetLabels.of_tokens(config.sheets.manifest, shards)
            lm.add_band(written.count_styles())
            written.styles = () if lm.band is None else lm.band.styles
        # A copy, because DeepSpeed may scatter the model's own one over processes.
        sheets = SheetSource(shards, config.sheets, copy.deepcopy(lm.sheet_reader), written)
    source = WindowSource(shards, config.data, lm, config.train.batch_size, sheets)
    parts = count_loss_parts(source.most_frames, max(lm.codes_of(track).codes for track in TRACKS))
    objective = LMObjective(lm, config.prompt_weight, parts)
    return Task(
        objective=objective,
        make_batch=source.make_batch,
        export=lm.save_pretrained,
        validate=make_validation(lm, shards, config.data, config.validation),
        # The codes of both tracks; a window counts once, without its prompt.
        count_units=lambda batch: batch["target_vocal"].numel() + batch["target_accompaniment"].numel(),
        count_flops=lambda batch: batch_flops(lm.config, batch, config.prompt_weight),
    )


def build_model(config: Config, shards: TokenShards) -> DualTrackLM:
    """Return a new model for the tokenizer, or the one to start from, checked against the tokens."""
    if config.start_from is not None:
        lm = DualTrackLM.from_pretrained(config.start_from)
    else:
        lm = DualTrackLM.for_tokenizer(DuoTokenizer.from_pretrained(config.tokenizer), config.model)
    if str(lm.tokenizer_fingerprint) != shards.index.tokenizer_fingerprint:
        raise CheckpointError(
            f"the tokens in {shards.folder} were made by the tokenizer {shards.index.tokenizer_fingerprint}, "
            f"the model is for {lm.tokenizer_fingerprint}; make the tokens again"
        )
    if config.sheets.reader is not None:
        lm.add_sheet_reader(SheetReader.from_pretrained(config.sheets.reader))
    return lm


def batch_flops(config: DualTrackLMConfig, batch: dict[str, Tensor], prompt_weight: float = 0.0) -> float:
    """Return the floating-point operations of a forward and backward pass on arguments of an LMObjective.

    As in PaLM's utilization (arXiv 2204.02311, B): 6 a step and weight, attention over all pairs of steps,
    what gradient checkpointing computes twice counts once; without look-ups, norms and softmax.
    """
    examples, frames = batch["target_vocal"].shape
    steps, width = batch["segment"].shape[1], config.hidden_dim
    keys = config.key_value_heads * width // config.heads
    layer = 2 * width * (width + keys + steps) + 3 * width * config.feed_forward_dim
    trunk = config.layers * layer + 2 * config.embedding_dim * width
    anchors = 2 * config.code_dim * config.embedding_dim
    heads = 0.0
    for track in TRACKS:
        size = getattr(config, f"{track}_codes")
        if not batch[f"weight_{track}"].any():
            continue
        # 4 a step where the other side, the tokenizer's code vectors, has no gradient.
        head = 6 * width * (config.code_dim + size) + 4 * config.code_dim * size
        heads += head * (2 if steps > frames and prompt_weight > 0 else 1)
    return float(examples * (steps * (6 * trunk + 4 * anchors) + frames * heads))


def make_validation(
    lm: DualTrackLM, shards: TokenShards, data: DataConfig, config: ValidationConfig
) -> Callable[[int, int], Figures] | None:
    """Return the function that measures the model as it is then; None where nothing is held out.

    It gives "cnbpt/unconditional_vocal" and so on of a process's share of the windows, the same at every call
    for the same weights.
    """
    if config.tokens is None and data.hold_out == 0:
        return None
    source, songs = find_held_out(shards, data, config)
    rate_hz = shards.index.frame_rate_hz
    seconds = max(each for each, _ in data.windows) if config.seconds is None else config.seconds
    codes = choose_windows(source, songs, max(1, round(seconds * rate_hz)), config.windows)
    prefix = min(round(config.prefix_seconds * rate_hz), codes["vocal"].shape[1] - 1)

    def validate(process: int, processes: int) -> Figures:
        was_training = lm.training
        lm.eval()
        try:
            return measure_windows(lm, codes, prefix, config.rows, process, processes)
        finally:
            lm.train(was_training)

    return validate


def measure_windows(
    lm: DualTrackLM, codes: dict[str, Tensor], prefix: int, rows: int, process: int, processes: int
) -> Figures:
    """cnBPT of every so many windows of {track: codes [windows, frames]}, by mode and track.

    prefix: in frames. Every process computes as many windows; those of others among them do not count.
    """
    windows = len(codes["vocal"])
    own = torch.arange(process, process + -(-windows // processes) * processes, processes)
    counted = int((own < windows).sum())
    vocal, accompaniment = (codes[track][own % windows] for track in TRACKS)
    alone = score_batch(lm, vocal, accompaniment, "unconditional", rows=rows).loss_nats
    paired = score_batch(lm, vocal, accompaniment, _INTO, rows=rows).loss_nats["accompaniment"][:, prefix:]
    nats = {f"unconditional_{track}": (track, alone[track]) for track in TRACKS}
    nats[_INTO] = ("accompaniment", paired)
    figures: Figures = {}
    for name, (track, values) in nats.items():
        kept = values[:counted].double()
        bits = nats_to_bits(float(kept.sum()))
        figures[f"cnbpt/{name}"] = codebook_normalized_bits(bits, [lm.codes_of(track).codes]), kept.numel()
    return figures


def find_held_out(
    shards: TokenShards, data: DataConfig, config: ValidationConfig
) -> tuple[TokenShards, list[TokenSong]]:
    """Return the shards and the songs in them that are not trained on."""
    if config.tokens is None:
        return shards, split_songs(shards.index.songs, data.hold_out)[1]
    source = TokenShards(config.tokens)
    check_tokens(source, shards.index.tokenizer_fingerprint)
    trained = {song.song for song in split_songs(shards.index.songs, data.hold_out)[0]}
    shared = next((song.song for song in source.index.songs if song.song in trained), None)
    if shared is not None:
        raise DataError(f"the song {shared} is in {source.folder} and is trained on; give other songs")
    return source, source.index.songs


def choose_windows(shards: TokenShards, songs: list[TokenSong], frames: int, count: int) -> dict[str, Tensor]:
    """Return {track: codes [windows, frames]} of many songs, by hashes that stay when a corpus grows."""
    ordered = sorted((s for s in songs if s.frames >= frames), key=lambda s: (s.fraction("window"), s.id))
    if not ordered:
        seconds = frames / shards.index.frame_rate_hz
        raise DataError(
            f"no held-out song in {shards.folder} has {seconds:g} s; raise data.hold_out or lower "
            f"validation.seconds"
        )
    seen: Counter[str] = Counter()
    ranked: list[tuple[int, TokenSong]] = []
    for song in ordered:
        ranked.append((seen[song.song], song))
        seen[song.song] += 1
    ranked.sort(key=lambda each: each[0])  # stable: first one item of each song, then second ones
    rows = []
    for _, song in ranked[:count]:
        start = int(song.fraction(f"start of {song.id}") * (song.frames - frames + 1))
        rows.append(shards.codes(song, start, frames))
    return {track: torch.stack([row[track] for row in rows]) for track in TRACKS}


main = recipe_main("Train the dual-track language model", Config, build)

if __name__ == "__main__":
    sys.exit(main())
