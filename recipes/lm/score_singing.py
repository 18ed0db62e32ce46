"""Scores sung in codes, without sound: each note by codes of one that was really sung so high and so long.

A corpus has some hundred thousand sung notes; put one after another as any score has them, in any key and
tempo, they make songs enough for a reader of bars and chords to learn from.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from duotok.lm.sheet.columns import METER, METERS, write_sheet
from duotok.lm.sheet.timeline import places_between
from duotok.recipes.corpus.manifest import Item
from duotok.recipes.corpus.scores.song import Song, Songs
from duotok.recipes.lm.tokens import TokenShards, TokenSong
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import NO_CHORD, UNKNOWN_CHORD, triad_of

_ALIKE = 6  # notes, shorter and longer ones, of which one is taken
_OTHER_OCTAVE = 0.15  # share of the songs that are sung in an octave that the voice's median is not in
_MOST_SEMITONES = 6
_TRIES = 8  # songs looked at for one in a meter


class CodeSinger:
    """The voices of a corpus: their notes by pitch and length, and how they are silent."""

    def __init__(self, shards: TokenShards, items: Mapping[str, Item], songs: Sequence[TokenSong]) -> None:
        """Raises DataError where no item of the songs has sung notes."""
        rate_hz, codes, offset = shards.index.frame_rate_hz, [], 0
        notes: dict[str, list[np.ndarray]] = {}
        rests: dict[str, list[np.ndarray]] = {}
        for song in songs:
            item = items.get(song.id)
            if item is None or not item.notes:
                continue
            rows = np.array([note[:3] for note in item.notes]) * [rate_hz, rate_hz, 1]
            edges = np.round(rows[:, :2]).astype(int).clip(0, song.frames) + offset
            # Pitch; beginning, the frame it is rounded to, and length.
            notes.setdefault(item.voice, []).append(
                np.stack([rows[:, 2], rows[:, 0] + offset, edges[:, 0], np.diff(edges)[:, 0]], axis=1)
            )
            gaps = np.stack([np.append(offset, edges[:, 1]), np.append(edges[:, 0], offset + song.frames)], 1)
            rests.setdefault(item.voice, []).append(gaps[gaps[:, 1] > gaps[:, 0]])
            codes.append(shards.codes(song)["vocal"].numpy())
            offset += song.frames
        if not notes:
            raise DataError("no item of the tokens has sung notes; scores cannot be sung by their codes")
        self._codes, self._rate_hz = np.concatenate(codes), rate_hz
        self._voices = []
        for voice, found in notes.items():
            rows = np.concatenate(found)
            rows = rows[rows[:, 3] > 0]
            rows = rows[np.lexsort((rows[:, 3], rows[:, 0]))]
            pitches, firsts = np.unique(rows[:, 0], return_index=True)
            pieces = np.split(rows[:, 1:], firsts[1:])
            self._voices.append(
                (
                    dict(zip(pitches.tolist(), pieces, strict=True)),
                    np.median(rows[:, 0]),
                    np.concatenate(rests[voice]),
                )
            )

    def sing(self, notes: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
        """Codes [frames] of notes [n, 3], start and end in frames, and pitch, in a random voice's octave."""
        by_pitch, middle, rests = self._voices[rng.integers(len(self._voices))]
        codes = self._rest(rests, frames, rng)
        if not len(notes):
            return codes
        octave = 12 * round((middle - np.median(notes[:, 2])) / 12)
        if rng.random() < _OTHER_OCTAVE:
            octave += int(rng.choice([-12, 12]))
        edges = np.round(notes[:, :2]).astype(int).clip(0, frames)
        for (first, last), (begin, _, pitch) in zip(edges, notes, strict=True):
            pitch = int(pitch) + octave
            choices = next((by_pitch[p] for p in (pitch, pitch - 12, pitch + 12) if p in by_pitch), None)
            if choices is None or last <= first:
                continue
            at = int(np.searchsorted(choices[:, 2], last - first))
            at = min(max(at + int(rng.integers(-_ALIKE, _ALIKE + 1)), 0), len(choices) - 1)
            near = choices[max(0, at - _ALIKE) : at + _ALIKE]
            # Where in a frame a note begins is heard in its first code.
            start, length = near[np.abs(near[:, 0] - near[:, 1] - begin + first).argmin(), 1:].astype(int)
            codes[first:last] = self._codes[start + np.arange(last - first) * length // (last - first)]
        return codes

    def _rest(self, rests: np.ndarray, frames: int, rng: np.random.Generator) -> np.ndarray:
        pieces, count = [self._codes[:0]], 0
        while count < frames and len(rests):
            first, last = rests[rng.integers(len(rests))]
            pieces.append(self._codes[first:last])
            count += last - first
        return np.resize(np.concatenate(pieces), frames)


@dataclass(frozen=True, kw_only=True)
class Score:
    """What of a song is sung and read, in its own seconds."""

    notes: np.ndarray  # [n, 3] start, end, pitch
    downbeats: np.ndarray
    chords: np.ndarray  # [n, 3] start, end, number
    beats_per_bar: int

    @classmethod
    def of_song(cls, song: Song) -> "Score":
        """What is sung and read of it."""
        return cls(
            notes=np.array([(note.start, note.end, note.pitch) for note in song.melody]),
            downbeats=np.array([song.beats[index] for index in song.downbeats]),
            chords=np.array([(span.start, span.end, triad_of(span.label)) for span in song.chords]).reshape(
                -1, 3
            ),
            beats_per_bar=song.beats_per_bar,
        )


class ScoreWindows:
    """Windows of the training songs of a source, each sung anew."""

    def __init__(self, songs: Songs, singer: CodeSinger, rate_hz: float) -> None:
        self._songs, self._names, self._singer, self._rate_hz = (
            songs,
            songs.of_split("train"),
            singer,
            rate_hz,
        )
        self._scores: dict[str, Score | None] = {}

    def draw(self, rng: np.random.Generator, frames: int, stretch: float) -> tuple[np.ndarray, np.ndarray]:
        """Codes [frames] and sheet [frames, COLUMNS] of a stretch of a song, slower or faster, in any key.

        Raises DataError where no song of the source can be sung.
        """
        # Meters are drawn, then songs until one is in that meter: most songs are in four.
        score, wanted, tries = None, METERS[rng.integers(len(METERS))], 0
        while score is None or (score.beats_per_bar != wanted and tries < _TRIES):
            if len(self._scores) == len(self._names) and not any(self._scores.values()):
                raise DataError(f"{self._songs.path} holds no song that can be sung; give other scores")
            score, tries = self._read(self._names[rng.integers(len(self._names))]) or score, tries + 1
        semitones = int(rng.integers(-_MOST_SEMITONES, _MOST_SEMITONES))
        scale = self._rate_hz * float(np.exp(rng.uniform(-1, 1) * np.log1p(stretch)))
        # Now and then a window begins before the song.
        length = max(score.notes[-1, 1], score.downbeats[-1]) * scale
        start = rng.uniform(-0.1 * frames, max(0.0, length - 0.8 * frames))
        notes, downbeats, chords = score.notes.copy(), score.downbeats * scale - start, score.chords.copy()
        notes[:, :2], notes[:, 2] = notes[:, :2] * scale - start, notes[:, 2] + semitones
        notes = notes[(notes[:, 1] > 0) & (notes[:, 0] < frames)]
        named = np.full(frames, UNKNOWN_CHORD)
        for first, last, number in chords:
            edges = [min(max(int(np.ceil(edge * scale - start - 0.5)), 0), frames) for edge in (first, last)]
            moved = (number % 12 + semitones) % 12 + number // 12 * 12 if 0 <= number < NO_CHORD else number
            named[edges[0] : edges[1]] = moved
        sheet = write_sheet(places_between(downbeats, frames), named).numpy()
        sheet[:, METER] = METERS.index(score.beats_per_bar)
        return self._singer.sing(notes, frames, rng), sheet

    def _read(self, name: str) -> Score | None:
        if name not in self._scores:
            try:
                self._scores[name] = Score.of_song(self._songs.read(name))
            except DataError:  # of songs with nothing to sing
                self._scores[name] = None
        return self._scores[name]
