"""Count how pop songs move, in the training scores of POP909: the tables of `tokenizer.music.progressions`.

Run: python -m duotok.recipes.tokenizer.count_progressions --songs pop909.tar.gz \\
         --out tokenizer/music/progressions.safetensors
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from duotok.recipes.corpus.scores.song import Song
from duotok.recipes.corpus.scores.sources import open_songs
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_bytes
from duotok.tokenizer.music.labels import NO_CHORD, key_of, nearest_triad
from duotok.tokenizer.music.progressions import relative_to

_EVERYWHERE = 0.001  # share that is given to what was never seen
_USUAL = 60  # changes of chord that are added by how often the chord sounds


def count(songs: Sequence[Song]) -> dict[str, np.ndarray]:
    """The tables, float32: logarithms of shares, relative to the tonic or the root."""
    chords, changes = np.zeros((2, NO_CHORD)), np.zeros((2, NO_CHORD, NO_CHORD))
    pitches = np.zeros((2, 12))
    for song in songs:
        spans = [
            (span.start, span.end, nearest_triad(span.label.partition("/")[0])[0]) for span in song.chords
        ]
        longest = max(song.keys, key=lambda span: span.end - span.start)
        before: tuple[int, int] | None = None
        for first, last in zip(song.beats, song.beats[1:], strict=False):
            middle = (first + last) / 2
            chord = next((chord for start, end, chord in spans if start <= middle < end), NO_CHORD)
            key = key_of(next((k for k in song.keys if k.start <= middle < k.end), longest).label)
            if not 0 <= chord < NO_CHORD:
                before = None
                continue
            mode, relative = key // 12, int(relative_to(chord, key % 12))
            chords[mode, relative] += 1
            if before is not None and before[0] == key and before[1] != relative:
                changes[mode, before[1], relative] += 1
            before = key, relative
        for note in song.melody:
            key = key_of(next((k for k in song.keys if k.start <= note.start < k.end), longest).label)
            pitches[key // 12, (note.pitch - key) % 12] += note.end - note.start
    shares = chords / chords.sum(axis=1, keepdims=True)
    changes += _USUAL * shares[:, None, :] * (1 - np.eye(NO_CHORD))
    return {
        "chords": _log_shares(chords),
        "changes": np.log(np.maximum(changes / changes.sum(axis=2, keepdims=True), np.exp(-12))).astype("f4"),
        "pitches": _log_shares(pitches) + np.float32(np.log(12)),
    }


def _log_shares(counts: np.ndarray) -> np.ndarray:
    counts = counts + _EVERYWHERE * counts.sum(axis=1, keepdims=True)
    return np.log(counts / counts.sum(axis=1, keepdims=True)).astype("f4")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Count how pop songs move.")
    parser.add_argument("--songs", type=Path, required=True, help="folder or tar.gz of scores")
    parser.add_argument("--out", type=Path, required=True, help="safetensors file to write")
    arguments = parser.parse_args(argv)

    def run() -> None:
        songs, read = open_songs(arguments.songs), []
        for name in songs.of_split("train"):
            try:
                read.append(songs.read(name))
            except DataError as error:
                print(f"left out: {error}", file=sys.stderr)
        write_bytes(arguments.out, save(count(read)))

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
