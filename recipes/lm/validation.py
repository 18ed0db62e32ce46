"""How predictable held-out songs are while a language model trains: fixed windows, a few forward passes.

The paper's protocol (P B.1.3, B.1.4) on windows of held-out songs: both tracks unconditionally, and the
accompaniment from the vocal after a given prefix.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.lm.metrics import codebook_normalized_bits
from duotok.recipes.lm.data import DataConfig
from duotok.recipes.lm.token_shards import TokenShards, TokenSong, split_songs
from duotok.tokenizer.common.errors import ConfigError, DataError

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


def make_validation(
    lm: DualTrackLM, shards: TokenShards, data: DataConfig, config: ValidationConfig
) -> Callable[[], dict[str, float]] | None:
    """Return the function that measures the model as it is then; None where nothing is held out.

    The function returns "cnbpt/unconditional_vocal" and so on, the same at every call for the same weights,
    and leaves the model in the mode it finds it in. Under ZeRO 3 every process must call it.
    """
    if config.tokens is None and data.hold_out == 0:
        return None
    source, songs = find_held_out(shards, data, config)
    rate_hz = shards.index.frame_rate_hz
    seconds = max(each for each, _ in data.windows) if config.seconds is None else config.seconds
    codes = choose_windows(source, songs, max(1, round(seconds * rate_hz)), config.windows)
    prefix = min(round(config.prefix_seconds * rate_hz), codes["vocal"].shape[1] - 1)

    def validate() -> dict[str, float]:
        was_training = lm.training
        lm.eval()
        try:
            return measure_windows(lm, codes, prefix, rows=config.rows)
        finally:
            lm.train(was_training)

    return validate


def measure_windows(lm: DualTrackLM, codes: dict[str, Tensor], prefix: int, rows: int) -> dict[str, float]:
    """cnBPT of windows {track: codes [windows, frames]} by mode and track; prefix in frames."""
    vocal, accompaniment = (codes[track] for track in TRACKS)
    alone = score_batch(lm, vocal, accompaniment, "unconditional", rows=rows)
    paired = score_batch(lm, vocal, accompaniment, _INTO, prefix_frames=prefix, rows=rows)
    bits = {f"unconditional_{track}": (track, alone.bits_per_token(track)) for track in TRACKS}
    bits[_INTO] = ("accompaniment", paired.bits_per_token("accompaniment"))
    return {
        f"cnbpt/{name}": codebook_normalized_bits(value, [lm.codes_of(track).codes])
        for name, (track, value) in bits.items()
    }


def find_held_out(
    shards: TokenShards, data: DataConfig, config: ValidationConfig
) -> tuple[TokenShards, list[TokenSong]]:
    """Return the shards and the songs in them that are not trained on."""
    if config.tokens is None:
        return shards, split_songs(shards.index.songs, data.hold_out)[1]
    source = TokenShards(config.tokens)
    if source.index.tokenizer_fingerprint != shards.index.tokenizer_fingerprint:
        raise DataError(
            f"{source.folder} holds tokens of the tokenizer {source.index.tokenizer_fingerprint}, "
            f"{shards.folder} of {shards.index.tokenizer_fingerprint}; make one of them again"
        )
    trained = {song.song for song in split_songs(shards.index.songs, data.hold_out)[0]}
    shared = next((song.song for song in source.index.songs if song.song in trained), None)
    if shared is not None:
        raise DataError(f"the song {shared} is in {source.folder} and is trained on; give other songs")
    return source, source.index.songs


def choose_windows(shards: TokenShards, songs: list[TokenSong], frames: int, count: int) -> dict[str, Tensor]:
    """Return {track: codes [windows, frames]}: at most so many, the first items of as many songs as possible.

    Songs come in the order of a hash, and places go by one: they stay where they are when a corpus grows.
    """
    ordered = sorted((s for s in songs if s.frames >= frames), key=lambda s: (s.fraction("window"), s.id))
    if not ordered:
        seconds = frames / shards.index.frame_rate_hz
        raise DataError(
            f"no held-out song in {shards.folder} has {seconds:g} s; raise data.hold_out or lower "
            f"validation.seconds"
        )
    seen: dict[str, int] = {}
    ranked: list[tuple[int, TokenSong]] = []
    for song in ordered:
        ranked.append((seen.get(song.song, 0), song))
        seen[song.song] = seen.get(song.song, 0) + 1
    ranked.sort(key=lambda each: each[0])  # stable: first one item of each song, then second ones
    rows: dict[str, list[Tensor]] = {track: [] for track in TRACKS}
    for _, song in ranked[:count]:
        start = int(song.fraction(f"start of {song.id}") * (song.frames - frames + 1))
        for track, codes in shards.codes(song, start, frames).items():
            rows[track].append(codes)
    return {track: torch.stack(each) for track, each in rows.items()}
