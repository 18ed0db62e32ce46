"""Lead sheets beside tokens: those written in the corpus, what a reader makes of a vocal, how both agree."""

import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from duotok.lm.sheet.columns import (
    BEATS_PER_BAR,
    CHART,
    CHORD,
    COLUMNS,
    METER,
    METERS,
    PLACE,
    PLACES,
    STYLE,
    TEMPO,
    TRUST,
    UNKNOWN,
    unknown_sheet,
    write_sheet,
)
from duotok.lm.sheet.playing import FULL, HELD, LIGHT, OUT, STEM_COLUMNS, BandConfig, tempo_class
from duotok.lm.sheet.reader import SheetReader
from duotok.lm.sheet.timeline import places_between
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.lm.tokens import TokenShards, TokenSong
from duotok.tokenizer.common.errors import ConfigError, DataError
from duotok.tokenizer.music.labels import chords_of_blocks

# Onsets per beat from which a stem plays in full: about the median of the corpus' bars. Notes struck together
# are one onset.
_FULL_FROM = {"drums": 3.0, "bass": 1.25, "chords": 2.5}
_STEM_NAMES = {"drums": "drums", "bass": "bass", "other": "chords"}  # of the corpus -> of the sheet
_TOGETHER_SECONDS = 0.03
_HELD_SHARE = 0.2  # what begins in this first part of a bar, and nothing later, is held
# Bass and chords rest in the corpus on purpose alone, far more often than in a band that is told nothing. So
# their rests are always told, and where the level is unknown they play. Drums rest in many bands anyway.
_TOLD_RESTS = [STEM_COLUMNS["bass"], STEM_COLUMNS["chords"]]
_NEAR = 1  # parts of a bar that a place may be off: 0.1 s in a bar of 2 s


class SheetLabels:
    """The written sheets of the items of a manifest; of an item that is not in it nothing is known."""

    styles: Sequence[str] = ()  # those that STYLE counts

    def __init__(self, manifest: str | Path, wanted: Collection[str], folder: Path, rate_hz: float) -> None:
        """wanted: ids of the items in the folder, of frames at this rate; DataError where there are none."""
        self.items = {item.id: item for item in read_manifest(manifest) if item.id in wanted}
        if not self.items:
            raise DataError(f"no item of {manifest} is in {folder}; give the manifest it was made of")
        self._rate_hz = rate_hz
        self._known: dict[str, Tensor] = {}

    @classmethod
    def of_tokens(cls, manifest: str | Path, shards: TokenShards) -> "SheetLabels":
        """Return the sheets of the items whose tokens are in shards."""
        wanted = {song.id for song in shards.index.songs}
        return cls(manifest, wanted, shards.folder, shards.index.frame_rate_hz)

    def count_styles(self) -> BandConfig:
        """Count which styles the items are in, by meter and tempo."""
        return BandConfig.count(
            (item.style, item.beats_per_bar, item.tempo_bpm) for item in self.items.values() if item.tempo_bpm
        )

    def cut(self, name: str, start: int, frames: int) -> Tensor:
        """Return the sheet [frames, COLUMNS] of an item from frame `start` on."""
        if name not in self.items:
            return unknown_sheet(frames)
        if name not in self._known:
            sheet = label_frames(self.items[name], self._rate_hz)
            told = label_playing(sheet, self.items[name], self._rate_hz, self.styles)
            self._known[name] = told.to(torch.int16)  # small, as all of them are kept
        found = self._known[name][start : start + frames].long()
        return torch.cat([found, unknown_sheet(frames - len(found))])


def label_frames(item: Item, rate_hz: float) -> Tensor:
    """Return an item's sheet [frames, COLUMNS]: UNKNOWN outside its bar lines and where no chord is known."""
    frames = round(item.seconds * rate_hz)
    places = places_between(np.asarray(item.downbeats_seconds, dtype=float) * rate_hz, frames)
    chords = chords_of_blocks(item.chords, frames, rate_hz)
    return write_sheet(places, chords)


def label_playing(sheet: Tensor, item: Item, rate_hz: float, styles: Sequence[str]) -> Tensor:
    """Return an item's sheet [frames, COLUMNS] with what its band plays; levels where its notes are known."""
    sheet = sheet.clone()
    if item.beats_per_bar in METERS:
        sheet[:, METER] = METERS.index(item.beats_per_bar)
    if item.tempo_bpm:
        sheet[:, TEMPO] = tempo_class(item.tempo_bpm)
    if item.style in styles:
        sheet[:, STYLE] = styles.index(item.style)
    lines = np.array([*item.downbeats_seconds, item.seconds])
    if len(lines) < 2 or not item.band:
        return sheet
    edges = np.round(lines * rate_hz).astype(int)
    for stem, levels in find_levels(item.band, lines, item.beats_per_bar).items():
        for first, last, level in zip(edges[:-1], edges[1:], levels, strict=True):
            sheet[first:last, STEM_COLUMNS[stem]] = int(level)
    return sheet


def write_chart(item: Item, rate_hz: float, styles: Sequence[str], *, frames: int, start: int = 0) -> Tensor:
    """Return the chart [frames, 5] of an item from frame `start` on, UNKNOWN behind its end.

    For a renderer, see `renderer.chart`; STYLE counts these styles.
    """
    whole = label_playing(label_frames(item, rate_hz), item, rate_hz, styles)[:, list(CHART)]
    found = whole[start : start + frames]
    return functional.pad(found, (0, 0, 0, frames - len(found)), value=UNKNOWN)


def find_levels(band: Mapping[str, Sequence], lines: np.ndarray, beats_per_bar: int) -> dict[str, np.ndarray]:
    """Return what each stem does in each bar, {"drums", "bass", "chords": levels [bars]}.

    band: as in `Item.band`. lines [bars + 1]: bar lines in seconds.
    """
    found = {}
    for stem, name in _STEM_NAMES.items():
        notes = np.array([note[:2] for *_, part in band.get(stem, ()) for note in part], dtype=float).reshape(
            -1, 2
        )
        onsets = np.sort(notes[:, 0])
        onsets = onsets[np.diff(onsets, prepend=-1.0) > _TOGETHER_SECONDS]
        bar = np.searchsorted(lines, onsets + _TOGETHER_SECONDS, "right") - 1  # a player may come early
        inside = (bar >= 0) & (bar < len(lines) - 1)
        bar, onsets = bar[inside], onsets[inside]
        late = onsets - lines[bar] > _HELD_SHARE * np.diff(lines)[bar]
        count, moves = (np.bincount(bar, weights, len(lines) - 1) for weights in (None, late))
        levels = np.where(count >= _FULL_FROM[name] * beats_per_bar, FULL, LIGHT)
        levels[moves == 0] = HELD
        sounding = np.zeros(len(lines) - 1, dtype=bool)
        for start, end in notes if name != "drums" else ():  # what was struck before still sounds
            first, last = np.searchsorted(lines, (start + _TOGETHER_SECONDS, end - _TOGETHER_SECONDS))
            sounding[max(0, first - 1) : last] = True
        levels[(count == 0) & ~sounding] = OUT
        found[name] = levels
    return found


@dataclass(frozen=True, kw_only=True)
class SheetConfig:
    """Which sheets a band learns to play from; used where the model has a sheet reader."""

    reader: str | None = None  # folder of duotok.recipes.lm.train_sheet_reader, added to the model
    manifest: str | None = None  # of the same items, with their scores; None: only the reader tells
    # Share of the examples that are shown the corpus' own sheet: it teaches to trust what is written, the
    # reader's teaches how far each level of trust may be wrong.
    written: float = 0.5
    dropout: float = 0.15  # of places and of chords, each by itself
    # Half of the read sheets are of vocals with up to so large a share of strange codes: the reader has
    # learned these songs, and is seldom as unsure of them as of others.
    damage: float = 0.6
    # Of each thing that the band is told, style, meter, tempo and the level of each stem; and of all of them.
    playing_dropout: float = 0.2
    no_playing: float = 0.1
    # Share of the windows that are of songs in other meters than four; None: as many as there are.
    other_meters: float | None = None

    def __post_init__(self) -> None:
        for name in ("written", "dropout", "damage", "playing_dropout", "no_playing", "other_meters"):
            if not 0 <= (getattr(self, name) or 0.0) <= 1:
                raise ConfigError(f"sheets.{name} must be in 0..1, got {getattr(self, name)}")
        if self.other_meters is not None and self.manifest is None:
            raise ConfigError("sheets.other_meters needs sheets.manifest, which tells the meters")


class SheetSource:
    """Draws the sheets of windows; what the reader says of an item is kept."""

    def __init__(
        self,
        shards: TokenShards,
        config: SheetConfig,
        reader: SheetReader,
        written: SheetLabels | None = None,
    ) -> None:
        """written: the corpus' own sheets; None: only the reader tells."""
        self._shards, self._config, self._reader, self._written = shards, config, reader, written
        self._read: dict[tuple[str, bool], Tensor] = {}

    def weigh(self, songs: Sequence[TokenSong]) -> np.ndarray:
        """Return how likely each song is, summing to 1: a frame of one meter as likely as any other of it."""
        weights = np.array([song.frames for song in songs], dtype=np.float64)
        share = self._config.other_meters
        is_other = np.array([self._beats_per_bar(song) not in (None, BEATS_PER_BAR) for song in songs])
        if share is not None and is_other.any() and not is_other.all():
            for which, part in ((is_other, share), (~is_other, 1 - share)):
                weights[which] *= part / weights[which].sum()
        return weights / weights.sum()

    def _beats_per_bar(self, song: TokenSong) -> int | None:
        item = None if self._written is None else self._written.items.get(song.id)
        return None if item is None else item.beats_per_bar

    def draw(self, rng: np.random.Generator, song: TokenSong, start: int, frames: int) -> Tensor:
        """Return a sheet [frames, COLUMNS] of a song from frame `start` on."""
        is_written = rng.random() < self._config.written
        hidden = rng.random(2) < self._config.dropout
        untold = rng.random(COLUMNS - METER) < self._config.playing_dropout
        untold |= rng.random() < self._config.no_playing
        sheet = unknown_sheet(frames) if self._written is None else self._written.cut(song.id, start, frames)
        if self._written is None or not is_written:
            read = self.read(song, damaged=rng.random() < 0.5)[start : start + frames]
            sheet[: len(read), :METER] = read[:, :METER]
        rests = torch.zeros_like(sheet, dtype=torch.bool)
        rests[:, _TOLD_RESTS] = sheet[:, _TOLD_RESTS] == OUT
        sheet[:, METER:].masked_fill_(torch.from_numpy(untold) & ~rests[:, METER:], UNKNOWN)
        for column, trust in TRUST.items():
            if hidden[column]:
                sheet[:, [column, trust]] = UNKNOWN
        return sheet

    def read(self, song: TokenSong, *, damaged: bool = False) -> Tensor:
        """Return what the reader says of a whole item [frames, COLUMNS], in its meter; always the same."""
        key = (song.id, damaged)
        if key not in self._read:
            codes = self._shards.codes(song)["vocal"].long()
            if damaged:
                codes = self._damage(codes, np.random.default_rng(zlib.crc32(song.id.encode())))
            self._read[key] = self._reader.read(codes[None], self._beats_per_bar(song))[0]
        return self._read[key]

    def _damage(self, codes: Tensor, rng: np.random.Generator) -> Tensor:
        is_hit = torch.from_numpy(rng.random(len(codes)) < rng.uniform(0, self._config.damage))
        strange = torch.from_numpy(rng.integers(self._reader.config.vocal_codes, size=len(codes)))
        return torch.where(is_hit, strange, codes)


def measure_agreement(reader: SheetReader, songs: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """What `agree` says of what is read out of (vocal codes [frames], written sheet [frames, COLUMNS])."""
    return agree((reader.read(codes[None].long())[0], written) for codes, written in songs)


def agree(sheets: Iterable[tuple[Tensor, Tensor]]) -> dict[str, float]:
    """Shares of frames, means over songs of (sheet, written sheet), each [frames, COLUMNS].

    bar: within one sixteenth part of the right place in the bar (0.19 by chance); chord: the right chord.
    Frames of which the written sheet does not know it do not count.
    """
    shares: dict[str, list[float]] = {"bar": [], "chord": []}
    for found, written in sheets:
        apart = (found[:, PLACE] - written[:, PLACE] + _NEAR) % PLACES
        for name, agrees, known in (
            ("bar", apart <= 2 * _NEAR, written[:, PLACE] != UNKNOWN),
            ("chord", found[:, CHORD] == written[:, CHORD], written[:, CHORD] != UNKNOWN),
        ):
            if known.any():
                shares[name].append(float(agrees[known].float().mean()))
    return {f"{name}_agreement": sum(each) / len(each) for name, each in shares.items() if each}
