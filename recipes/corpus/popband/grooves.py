"""Groove MIDI (Gillick et al. 2019, CC BY 4.0): drummers' performances, with their own timing and velocities.

A performance is cut into bars; `Band` plays whole phrases of them, warped to the beats of the song. The notes
of the players' drum kit (Roland TD-11) become those of General MIDI.
"""

import csv
import io
import re
import sys
import tarfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import mido
import numpy as np

from duotok.tokenizer.common.errors import DataError

GENERAL_MIDI = {  # TD-11 note -> General MIDI key
    36: 36, 37: 37, 38: 38, 40: 38, 48: 50, 50: 50, 45: 47, 47: 47, 43: 43, 58: 43, 46: 46, 26: 46, 42: 42,
    22: 42, 44: 44, 49: 49, 55: 49, 57: 57, 52: 57, 51: 51, 59: 51, 53: 53,
}  # fmt: skip
TOMS = (43, 47, 50)
# Groove MIDI's styles, the finer name before the coarser one, and the styles they are played in here.
STYLE_NAMES = {
    "rock/halftime": ("ballad", "rock"), "rock/folk": ("folk",), "rock/shuffle": ("shuffle",),
    "rock": ("rock",), "punk": ("rock",), "pop/soft": ("ballad", "folk"), "pop": ("rock", "ballad"),
    "funk/purdieshuffle": ("shuffle",), "funk": ("funk",), "hiphop": ("funk", "soul"), "afrobeat": ("funk",),
    "soul": ("soul",), "gospel": ("soul",), "dance/disco": ("disco",), "dance/breakbeat": ("electronic",),
    "dance": ("disco", "electronic"), "reggae": ("reggae",), "jazz/funk": ("funk",),
    "jazz/fusion": ("funk",), "jazz": ("shuffle",), "blues": ("shuffle",), "country": ("folk",),
    "highlife": ("folk",), "latin": ("bossa",), "neworleans/secondline": ("shuffle",),
    "neworleans": ("funk",),
}  # fmt: skip
OTHER_METERS = {  # the same of bars of three and six
    "rock": ("ballad", "folk", "soul", "slow_six", "waltz"), "jazz": ("shuffle", "waltz"),
    "latin": ("waltz",),
}  # fmt: skip
TEMPO_FACTOR = 1.2  # how much faster or slower than it was a performance is played
PHRASE_BARS = (16, 8, 4, 2, 1)
EARLY_BEATS = 0.15  # a stroke so much before a bar belongs to it
LONGEST_FILE_BYTES = 2_000_000
MEMBER = re.compile(r"(?:^|/)(drummer\d+/.+\.midi?|info\.csv)$")


@dataclass(frozen=True, kw_only=True)
class Performance:
    """One line of info.csv."""

    file: str
    styles: tuple[str, ...]  # of ours
    beats_per_bar: int
    beat_unit: int  # 4: a quarter, 8: an eighth
    beats_per_minute: float


class Grooves:
    """The performances of a Groove MIDI folder or tar.gz; nothing is ever unpacked to disk."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._files = dict(_read_files(self.path))
        if "info.csv" not in self._files:
            raise DataError(
                f"{path} is not Groove MIDI (no info.csv); see magenta.tensorflow.org/datasets/groove"
            )
        try:
            rows = list(csv.DictReader(io.StringIO(self._files["info.csv"].decode(errors="replace"))))
        except csv.Error as error:
            raise DataError(f"info.csv of {path} is broken: {error}") from error
        found = [self._read_row(row) for row in rows]
        self.performances = [each for each in found if each is not None]
        self._known: dict[str, list[np.ndarray]] = {}
        if not self.performances:
            raise DataError(f"{path} has no performance in a style that is played here")

    def _read_row(self, row: dict[str, str]) -> Performance | None:
        """A performance of the training split with a beat, none where it has no use here."""
        try:
            beats, unit = (int(number) for number in row["time_signature"].split("-"))
            style, tempo, file = row["style"], float(row["bpm"]), row["midi_filename"]
            usable = row["beat_type"] == "beat" and row["split"] == "train"
        except (KeyError, ValueError, TypeError, AttributeError):
            return None
        table = STYLE_NAMES if beats == 4 else OTHER_METERS
        styles = table.get(style) or table.get(style.partition("/")[0]) or ()
        if not usable or not styles or beats not in (3, 4, 6) or file not in self._files:
            return None
        if not 20 < tempo < 400 or unit not in (4, 8):
            return None
        if unit == 8:
            tempo *= 2  # their tempo is that of quarters
        return Performance(
            file=file, styles=styles, beats_per_bar=beats, beat_unit=unit, beats_per_minute=tempo
        )

    def draw(
        self, style: str, beats_per_bar: int, beats_per_minute: float, rng: np.random.Generator
    ) -> list[np.ndarray] | None:
        """A phrase in the style and about the tempo: [strokes, 3] of each bar; None where there is none.

        The columns are the time in beats after the bar's first one, the General MIDI key and the velocity.
        """
        fitting = [
            each
            for each in self.performances
            if style in each.styles
            and each.beats_per_bar == beats_per_bar
            and 1 / TEMPO_FACTOR <= each.beats_per_minute / beats_per_minute <= TEMPO_FACTOR
        ]
        for index in rng.permutation(len(fitting)):
            file = fitting[index].file
            if file not in self._known:
                self._known[file] = self._read_bars(fitting[index])
            bars = self._known[file]
            if bars:
                return _choose_phrase(bars, rng)
        return None

    def _read_bars(self, performance: Performance) -> list[np.ndarray]:
        """The bars of a performance; none, and a line that says so, where it cannot be played."""
        try:
            midi = mido.MidiFile(file=io.BytesIO(self._files[performance.file]), clip=True)
            strokes = _read_strokes(midi, performance.beat_unit)
        except (OSError, EOFError, ValueError, KeyError, IndexError, zlib.error) as error:
            print(f"{self.path}: {performance.file} is broken: {error!r:.100}; left out", file=sys.stderr)
            return []
        if not len(strokes):
            print(f"{self.path}: {performance.file} has no notes; left out", file=sys.stderr)
            return []
        number = np.floor((strokes[:, 0] + EARLY_BEATS) / performance.beats_per_bar).astype(int)
        strokes[:, 0] -= number * performance.beats_per_bar
        # The last bar is whole only where something is played at its end.
        is_cut = strokes[number == number.max(), 0].max() < performance.beats_per_bar - 1.5
        return [strokes[number == bar] for bar in range(max(1, number.max() + 1 - is_cut))]


def _read_files(path: Path) -> Iterable[tuple[str, bytes]]:
    """(name from the drummer's folder on, content) of every file that is used."""
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                match = MEMBER.search(file.relative_to(path).as_posix())
                if match and file.is_file() and file.stat().st_size <= LONGEST_FILE_BYTES:
                    yield match[1], file.read_bytes()
            return
        with tarfile.open(path, "r:*") as archive:
            for member in archive:
                match = MEMBER.search(member.name)
                opened = match and member.isfile() and member.size <= LONGEST_FILE_BYTES
                file = archive.extractfile(member) if opened else None
                if match and file is not None:
                    yield match[1], file.read()
    except (OSError, EOFError, tarfile.TarError, zlib.error) as error:
        raise DataError(f"cannot read the grooves {path}: {error}; give Groove MIDI's tar.gz") from error


def _read_strokes(midi: mido.MidiFile, beat_unit: int) -> np.ndarray:
    """Time in beats, General MIDI key and velocity of every stroke [strokes, 3]."""
    strokes, tick = [], 0
    for message in mido.merge_tracks(midi.tracks):
        tick += message.time
        if message.type == "note_on" and message.velocity > 0 and message.note in GENERAL_MIDI:
            beat = tick / midi.ticks_per_beat * beat_unit / 4
            strokes.append((beat, GENERAL_MIDI[message.note], message.velocity))
    return np.array(strokes, dtype=float).reshape(-1, 3)


def _choose_phrase(bars: list[np.ndarray], rng: np.random.Generator) -> list[np.ndarray]:
    """Consecutive bars from a multiple of four bars on, that end in a fill if the drummer plays any."""
    length = next(length for length in PHRASE_BARS if length <= len(bars))
    starts = np.arange(0, len(bars) - length + 1, min(length, 4))
    toms = np.array([np.isin(bars[start + length - 1][:, 1], TOMS).sum() for start in starts])
    best = starts[toms >= np.quantile(toms, 0.67)]
    first = int(best[rng.integers(len(best))])
    return bars[first : first + length]
