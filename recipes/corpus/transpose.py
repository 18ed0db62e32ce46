"""More songs out of a corpus: the same files played faster or slower, in other keys, tempi and voices.

Formants move with the pitch, so that every singer becomes several (speed perturbation; Ko et al., 2015). Only
a manifest is written: the files are resampled as they are read.

Run: python -m duotok.recipes.corpus.transpose --manifest data/popband/train.jsonl --semitones -4 -2 0 2 4 \\
         --out data/popband/train-transposed.jsonl
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from duotok.recipes.corpus.manifest import Item, read_manifest, write_manifest
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import transpose_label


def transpose_item(item: Item, semitones: int) -> Item:
    """Return the item as it is heard so many semitones higher; its id ends in their number with a sign."""
    if semitones == 0:
        return item
    speed = 2.0 ** (semitones / 12)

    def move(seconds: float) -> float:
        return round(seconds / speed, 4)

    return replace(
        item,
        id=f"{item.id}{semitones:+d}",
        semitones=item.semitones + semitones,
        seconds=item.seconds / speed,
        tempo_bpm=None if item.tempo_bpm is None else round(item.tempo_bpm * speed, 3),
        beats_seconds=[move(beat) for beat in item.beats_seconds],
        downbeats_seconds=[move(beat) for beat in item.downbeats_seconds],
        chords=[(move(a), move(b), transpose_label(label, semitones)) for a, b, label in item.chords],
        key=None if item.key is None else transpose_label(item.key, semitones),
        keys=[(move(a), move(b), transpose_label(label, semitones)) for a, b, label in item.keys],
        notes=[(move(a), move(b), pitch + semitones, text) for a, b, pitch, text in item.notes],
        lyrics=[(move(a), move(b), text) for a, b, text in item.lyrics],
        band={
            stem: [
                [program, drums, _move_notes(notes, speed, 0 if drums else semitones)]
                for program, drums, notes in parts
            ]
            for stem, parts in item.band.items()
        },
    )


def _move_notes(notes: list, speed: float, semitones: int) -> list:
    return [
        [round(start / speed, 3), round(end / speed, 3), min(max(pitch + semitones, 0), 127), velocity]
        for start, end, pitch, velocity in notes
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="A manifest of the same songs in other keys and tempi")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument(
        "--semitones", type=int, nargs="+", required=True, metavar="N", help="up or down; 0: as they are"
    )
    parser.add_argument("--out", type=Path, required=True, help="new manifest, in the same folder")
    arguments = parser.parse_args(argv)

    def transpose() -> None:
        if arguments.out.resolve().parent != arguments.manifest.resolve().parent:
            raise DataError(
                f"--out must be in {arguments.manifest.parent}, where the paths of the items begin"
            )
        if arguments.out.resolve() == arguments.manifest.resolve():
            raise DataError("--out must be another file than --manifest; give it a name of its own")
        items = read_manifest(arguments.manifest)
        moved = [transpose_item(item, n) for n in dict.fromkeys(arguments.semitones) for item in items]
        write_manifest(arguments.out, moved)
        print(f"{len(moved)} items, {sum(item.seconds for item in moved) / 3600:.1f} h -> {arguments.out}")

    return guard(transpose)


if __name__ == "__main__":
    sys.exit(main())
