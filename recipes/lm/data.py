"""Random training batches for the language model, each a pure function of the random generator."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from duotok.lm.dual_track.layout import MODES, TRACKS
from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.sheet.columns import unknown_sheet
from duotok.recipes.lm.sheets import SheetSource
from duotok.recipes.lm.tokens import TokenShards, TokenSong, split_songs
from duotok.tokenizer.common.errors import ConfigError, DataError


@dataclass(frozen=True, kw_only=True)
class CodeDropout:
    """Damage to some of the codes that are shown, so that no song can be known by a few of them."""

    probability: float = 0.0  # of an example
    lowest: float = 0.1  # share of its frames
    highest: float = 0.4
    random_share: float = 0.5  # of the damaged frames get another song's code, the others PAD

    def __post_init__(self) -> None:
        for name in ("probability", "lowest", "highest", "random_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"code dropout: {name} must be in 0..1, got {getattr(self, name)}")
        if self.lowest > self.highest:
            raise ConfigError("code dropout: lowest must not exceed highest")


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which windows are drawn and how they are laid out."""

    tokens: str  # folder of duotok.recipes.lm.tokenize
    hold_out: float = 0.0  # share of the songs never trained on, for validation
    hours: float | None = None  # learn from so many of the other songs alone; None = all
    # Window lengths in seconds and their shares of the batches. train.batch_size counts windows of the
    # shortest length; of longer ones a batch holds as many as have the same number of frames.
    windows: tuple[tuple[float, float], ...] = ((30.0, 1.0),)
    vocal_to_accompaniment: float = 1.0  # shares of the batches
    accompaniment_to_vocal: float = 0.0
    unconditional: float = 0.0
    song_starts: float = 0.1  # share of windows that begin where their song begins
    no_prefix: float = 0.5  # share of windows with no prefix; the others have 1 frame to prefix_seconds
    prefix_seconds: float = 2.0
    source_dropout: float = 0.1  # share of examples without their source, for guidance
    history_dropout: CodeDropout = CodeDropout()  # of the target's shown past: the source is to be heard
    source_code_dropout: CodeDropout = CodeDropout()  # of single codes of the source, not to be known by them

    def __post_init__(self) -> None:
        if not self.windows or any(seconds <= 0 or share < 0 for seconds, share in self.windows):
            raise ConfigError("data.windows must be a list of [seconds, share], seconds above 0")
        if sum(share for _, share in self.windows) <= 0 or sum(self.mode_shares().values()) <= 0:
            raise ConfigError("data: some window and some mode must have a share above 0")
        if min(self.mode_shares().values()) < 0 or self.prefix_seconds < 0:
            raise ConfigError("data: shares and prefix_seconds must not be negative")
        for name in ("song_starts", "no_prefix", "source_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConfigError(f"data.{name} must be in 0..1, got {getattr(self, name)}")
        if self.hours is not None and self.hours <= 0:
            raise ConfigError(f"data.hours must be above 0, got {self.hours:g}")
        if not 0 <= self.hold_out < 1:
            raise ConfigError(f"data.hold_out must be at least 0 and below 1, got {self.hold_out}")

    def mode_shares(self) -> dict[str, float]:
        """Return the share of each mode."""
        return {mode: getattr(self, mode) for mode in MODES}


def choose_hours(songs: Sequence[TokenSong], frames: float) -> list[TokenSong]:
    """Return items of so many frames together, or all; those of fewer frames are among those of more."""
    chosen, total = list[TokenSong](), 0
    for song in sorted(songs, key=lambda song: (song.fraction("hours"), song.id)):
        if total >= frames:
            break
        chosen.append(song)
        total += song.frames
    return chosen


class WindowSource:
    """Draws laid-out batches of windows from token shards, by their generator only."""

    def __init__(
        self,
        shards: TokenShards,
        config: DataConfig,
        lm: DualTrackLM,
        batch_size: int,
        sheets: SheetSource | None = None,
    ) -> None:
        """sheets: of the same shards; None: every sheet is unknown."""
        self._shards, self._config, self._lm, self._sheets = shards, config, lm, sheets
        self._batch_size = batch_size
        rate = shards.index.frame_rate_hz
        self._lengths = [max(1, round(seconds * rate)) for seconds, _ in config.windows]
        self._prefix_frames = round(config.prefix_seconds * rate)
        self._window_shares = _to_shares([share for _, share in config.windows])
        self._modes = list(config.mode_shares())
        self._mode_shares = _to_shares(list(config.mode_shares().values()))
        trained, _ = split_songs(shards.index.songs, config.hold_out)
        if config.hours is not None:
            trained = choose_hours(trained, config.hours * 3600 * rate)
        self._songs = {n: [s for s in trained if s.frames >= n] for n in self._lengths}
        for frames, songs in self._songs.items():
            if not songs:
                raise DataError(f"no song in {shards.folder} has {frames / rate:g} s; lower data.windows")
        # Every frame is as likely as any other, so long songs are drawn more often; sheets may favour meters.
        weigh = _weigh_by_frames if sheets is None else sheets.weigh
        self._song_shares = {frames: weigh(songs) for frames, songs in self._songs.items()}

    @property
    def most_frames(self) -> int:
        """The most frames that a batch has of each track."""
        return max(self._batch_size * min(self._lengths), *self._lengths)

    def make_batch(self, rng: np.random.Generator) -> dict[str, Tensor]:
        """Return the arguments of `LMObjective`: one mode and one window length."""
        mode = self._modes[int(rng.choice(len(self._modes), p=self._mode_shares))]
        frames = self._lengths[int(rng.choice(len(self._lengths), p=self._window_shares))]
        size = max(1, self._batch_size * min(self._lengths) // frames)
        windows = [self._draw_window(rng, frames) for _ in range(size)]
        stacked = {name: torch.stack([window[name] for window in windows]) for name in windows[0]}
        codes = {track: stacked.pop(track) for track in TRACKS}
        drop = torch.from_numpy(rng.random(size) < self._config.source_dropout)
        history = self._damage(rng, codes, self._config.history_dropout)
        heard = self._damage(rng, codes, self._config.source_code_dropout)
        sheet = stacked.pop("sheet") if mode == "vocal_to_accompaniment" else None
        layout = self._lm.lay_out(heard, mode, drop_source=drop, history=history, sheet=sheet)
        prefixes = torch.from_numpy(self._draw_prefixes(rng, size, frames))
        weights = (torch.arange(frames) >= prefixes[:, None]).float()
        predicted = MODES[mode][1]
        return {
            **layout._replace(position=layout.position.contiguous()).tensors(),
            **{f"target_{track}": codes[track] for track in TRACKS},
            **{f"weight_{t}": weights if t in predicted else torch.zeros_like(weights) for t in TRACKS},
        }

    def _draw_window(self, rng: np.random.Generator, frames: int) -> dict[str, Tensor]:
        songs: list[TokenSong] = self._songs[frames]
        song = songs[int(rng.choice(len(songs), p=self._song_shares[frames]))]
        start = 0 if rng.random() < self._config.song_starts else int(rng.integers(song.frames - frames + 1))
        sheet = unknown_sheet(frames) if self._sheets is None else self._sheets.draw(rng, song, start, frames)
        return {**self._shards.codes(song, start, frames), "sheet": sheet}

    def _draw_prefixes(self, rng: np.random.Generator, size: int, frames: int) -> np.ndarray:
        longest = min(self._prefix_frames, frames - 1)
        if longest < 1:
            return np.zeros(size, dtype=np.int64)
        prefixes = rng.integers(1, longest + 1, size=size)
        return np.where(rng.random(size) < self._config.no_prefix, 0, prefixes)

    def _damage(
        self, rng: np.random.Generator, codes: dict[str, Tensor], settings: CodeDropout
    ) -> dict[str, Tensor]:
        """Return the codes to show: some frames of some examples are PAD or another song's."""
        if settings.probability == 0:
            return codes
        size, frames = codes["vocal"].shape
        is_hit = rng.random(size) < settings.probability
        shares = rng.uniform(settings.lowest, settings.highest, size) * is_hit
        lost = torch.from_numpy(rng.random((size, frames)) < shares[:, None])
        foreign = torch.from_numpy(rng.random((size, frames)) < settings.random_share)
        order = torch.from_numpy(rng.permutation(size * frames))
        damaged = {}
        for track in TRACKS:
            others = codes[track].reshape(-1)[order].view(size, frames)
            replacement = torch.where(foreign, others, self._lm.pads[track])
            damaged[track] = torch.where(lost, replacement, codes[track])
        return damaged


def _weigh_by_frames(songs: Sequence[TokenSong]) -> np.ndarray:
    return _to_shares([song.frames for song in songs])


def _to_shares(weights: Sequence[float]) -> np.ndarray:
    return np.asarray(weights, dtype=np.float64) / np.sum(weights)
