"""Teach the melody reader chords and bars, on the training scores of one or more sources.

Run: python -m duotok.recipes.tokenizer.train_melody_reader \\
         --songs pop909.tar.gz openewld.tar.gz lieder.tar.gz --out tokenizer/music/weights/melody
"""

import argparse
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm, trange

from duotok.lm.sheet.columns import BEATS_PER_BAR
from duotok.recipes.corpus.scores.song import Song, Songs
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import NO_CHORD, UNKNOWN_CHORD, key_of, nearest_triad
from duotok.tokenizer.music.melody import (
    PACES,
    PARTS,
    MelodyReader,
    MelodyReaderConfig,
    over_tonics,
    tonics_of,
)
from duotok.tokenizer.music.progressions import relative_to

_FINE = 2 * PARTS  # parts of a beat, which are beats where twice as many are counted
_POINTS = 4  # at which the melody is looked up in each
_BATCH, _BEATS, _RATE = 16, 192, 0.004
_IGNORED = -100  # by the loss
_NUMBERS_HIDDEN, _NUMBERS_WRONG = 0.35, 0.1  # shares of the examples
_MOST_MISSED = 0.3  # notes that a half of the examples lack, at most
_LOSSES = (1.0, 0.5, 0.2)  # weights of chord, number and pace


@dataclass(frozen=True, kw_only=True)
class Beats:
    """A score, beat by beat."""

    sung: np.ndarray  # [beats, _FINE, 12] shares of pitch classes
    chords: np.ndarray  # [beats] 0..23, others are not known
    keys: np.ndarray  # [beats] 12-23 minor
    numbers: np.ndarray  # [beats] in the bar, -1 in one that is longer than the song's
    beats_per_bar: int

    @classmethod
    def of_song(cls, song: Song) -> "Beats":
        """The beats of a score; those before its first downbeat are counted backwards from it."""
        edges = np.array(song.beats)
        count = len(edges) - 1
        middles = (edges[:-1] + edges[1:]) / 2
        points = count * _FINE * _POINTS
        times = np.interp((np.arange(points) + 0.5) / (_FINE * _POINTS), np.arange(count + 1), edges)
        sung = np.zeros((count * _FINE, 12))
        for note in song.melody:
            parts = np.arange(*np.searchsorted(times, (note.start, note.end))) // _POINTS
            np.add.at(sung[:, note.pitch % 12], parts, 1 / _POINTS)
        longest = max(song.keys, key=lambda span: span.end - span.start)
        keys, chords = np.full(count, key_of(longest.label)), np.full(count, UNKNOWN_CHORD)
        for span in song.keys:
            keys[(middles >= span.start) & (middles < span.end)] = key_of(span.label)
        for span in song.chords:
            chord, _ = nearest_triad(span.label.partition("/")[0])
            chords[(middles >= span.start) & (middles < span.end)] = chord
        downbeats = np.array(sorted(song.downbeats))
        bar = np.searchsorted(downbeats, np.arange(count), side="right") - 1
        numbers = np.arange(count) - downbeats[bar.clip(0)]
        numbers = np.where(bar < 0, numbers % song.beats_per_bar, numbers)
        return cls(
            sung=sung.reshape(count, _FINE, 12),
            chords=chords,
            keys=keys,
            numbers=np.where(numbers < song.beats_per_bar, numbers, -1),
            beats_per_bar=song.beats_per_bar,
        )

    def counted(self, pace: float, offset: int = 0) -> "Beats":
        """The same as somebody hears it who counts `pace` beats for each; `offset`: which of two is one."""
        if pace == 1:
            return replace(self, sung=self.sung.reshape(-1, PARTS, 2, 12).mean(axis=2))
        if pace == 2:
            twice = 2 * (self.numbers[:, None] % 2) + np.arange(2)
            return replace(
                self,
                sung=self.sung.reshape(-1, PARTS, 12),
                chords=self.chords.repeat(2),
                keys=self.keys.repeat(2),
                numbers=np.where(self.numbers[:, None] < 0, -1, twice).flatten(),
            )
        count = (len(self.sung) - offset) // 2
        sung = self.sung[offset : offset + 2 * count].reshape(count, PARTS, -1, 12).mean(axis=2)
        chords, keys = (values[offset::2][:count] for values in (self.chords, self.keys))
        return replace(self, sung=sung, chords=chords, keys=keys, numbers=np.full(count, -1))


def draw_batch(
    sources: Sequence[Sequence[Beats]], rng: np.random.Generator
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """What the reader is given, and the chords, numbers and paces that it should say; _IGNORED: nothing.

    Half of the examples are of the first source, the others share the rest.
    """
    rows = []
    for _ in range(_BATCH):
        other = len(sources) > 1 and rng.random() < 0.5
        songs = sources[int(rng.integers(1, len(sources))) if other else 0]
        song = songs[int(rng.integers(len(songs)))]
        in_four = song.beats_per_bar == BEATS_PER_BAR  # others are counted in one way alone
        pace = int(rng.choice(len(PACES), p=(0.7, 0.15, 0.15))) if in_four else 0
        beats = song.counted(PACES[pace], int(rng.integers(2)))
        start = int(rng.integers(max(1, len(beats.sung) - _BEATS + 1)))
        cut = slice(start, start + _BEATS)
        sung, keys, numbers = beats.sung[cut], beats.keys[cut], beats.numbers[cut]
        if rng.random() < 0.5:
            sung = sung * (rng.random((len(sung), PARTS, 1)) > rng.uniform(0, _MOST_MISSED))
        tonics, kind = tonics_of(keys), rng.random()
        chords = np.where(beats.chords[cut] < NO_CHORD, beats.chords[cut], -1)
        wanted = np.where(chords < 0, _IGNORED, relative_to(chords, tonics))
        shown, asked = numbers, np.full(len(numbers), _IGNORED)
        if kind < _NUMBERS_HIDDEN:
            shown, asked = np.full(len(numbers), -1), np.where(numbers < 0, _IGNORED, numbers)
        elif kind < _NUMBERS_HIDDEN + _NUMBERS_WRONG:
            moved = (numbers + rng.integers(song.beats_per_bar)) % song.beats_per_bar
            shown = np.where(numbers < 0, -1, moved)
        meters = np.full(len(keys), song.beats_per_bar)
        paces = np.full(len(keys), pace if in_four else _IGNORED)
        row = (over_tonics(sung, tonics), shown, meters, keys // 12, wanted, asked, paces)
        gap = _BEATS - len(keys)
        for_gap = (0, -1, 0, 0, _IGNORED, _IGNORED, _IGNORED)
        rows.append([_pad(values, gap, value) for values, value in zip(row, for_gap, strict=True)])
    sung, *others = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
    return (sung.float(), *others[:3]), others[3:]


def _pad(values: np.ndarray, gap: int, value: int) -> np.ndarray:
    return np.pad(values, [(0, gap), *[(0, 0)] * (values.ndim - 1)], constant_values=value)


def train(
    sources: Sequence[Sequence[Beats]], config: MelodyReaderConfig, steps: int, seed: int
) -> MelodyReader:
    """A reader that has seen so many batches of the songs; see draw_batch."""
    torch.manual_seed(seed)
    rng, reader = np.random.default_rng(seed), MelodyReader(config)
    optimizer = torch.optim.AdamW(reader.parameters(), lr=_RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps)
    for _ in trange(steps, desc="melody reader", disable=None):
        given, wanted = draw_batch(sources, rng)
        loss = torch.zeros(())
        for weight, logits, labels in zip(_LOSSES, reader(*given), wanted, strict=True):
            if (labels != _IGNORED).any():
                loss = loss + weight * nn.functional.cross_entropy(
                    logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED
                )
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return reader.eval()


def measure(reader: MelodyReader, songs: Sequence[Beats]) -> dict[str, float]:
    """Shares of beats with the right chord, and of the right number in the bar where that is not told."""
    right: dict[str, list[float]] = {"chord": [], "number": []}
    for song in songs:
        beats = song.counted(1.0)
        chords = reader.judge(beats.sung, beats.keys, beats.beats_per_bar, beats.numbers)[0].argmax(axis=1)
        numbers = reader.judge(beats.sung, beats.keys, beats.beats_per_bar)[1].argmax(axis=1)
        known = (beats.chords >= 0) & (beats.chords < NO_CHORD)
        if known.any():
            right["chord"].append(float((chords == beats.chords)[known].mean()))
        right["number"].append(float((numbers == beats.numbers)[beats.numbers >= 0].mean()))
    return {name: float(np.mean(shares)) for name, shares in right.items()}


def read_beats(songs: Songs, split: str) -> list[Beats]:
    """The songs of a split that have a melody; DataError if there are none."""
    found = []
    for name in tqdm(songs.of_split(split), desc=f"{songs.path.name}: {split}", disable=None):
        with suppress(DataError):  # of songs with nothing to sing
            found.append(Beats.of_song(songs.read(name)))
    if not found:
        raise DataError(f"{songs.path} has no song for {split} that can be sung; give other scores")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Teach the melody reader chords and bars.")
    text = "folders or tar.gz of scores; half of what is learned is of the first"
    parser.add_argument("--songs", type=Path, nargs="+", required=True, help=text)
    parser.add_argument("--score-cache", type=Path, help="folder of what was read of MusicXML")
    parser.add_argument("--out", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=4_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    def run() -> None:
        sources = [open_songs(path, arguments.score_cache) for path in arguments.songs]
        trained, held_out = ([read_beats(s, split) for s in sources] for split in ("train", "validation"))
        reader = train(trained, MelodyReaderConfig(), arguments.steps, arguments.seed)
        reader.save_pretrained(arguments.out, half=True)
        for songs, beats in zip(sources, held_out, strict=True):
            print(songs.path.name, measure(reader, beats))

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
