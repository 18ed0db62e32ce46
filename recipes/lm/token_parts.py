"""Parts of a folder of token shards, made on several machines, and how they become one folder."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

from duotok.recipes.lm.token_shards import TokenIndex, read_index, shard_path, write_index
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import whole_file, write_json

PART = re.compile(r"part-(\d+)-of-(\d+)")
FINISHED = "finished.json"


def part_folder(out: Path, part: tuple[int, int]) -> Path:
    """Return the folder of a part (number from 1 on, of how many)."""
    return out / f"part-{part[0]}-of-{part[1]}"


def mark_finished(folder: Path, is_finished: bool) -> None:
    """Say whether all items of a part have been gone through."""
    if is_finished:
        write_json(folder / FINISHED, {})
    else:
        (folder / FINISHED).unlink(missing_ok=True)


def find_parts(out: Path) -> list[Path]:
    """Return the part folders in the order of their numbers; DataError unless all are there and finished."""
    found = [(match, path) for path in out.glob("part-*") if (match := PART.fullmatch(path.name))]
    counts = {int(match[2]) for match, _ in found}
    if len(counts) > 1:
        raise DataError(
            f"{out} holds parts of {' and of '.join(map(str, sorted(counts)))}; delete those of one kind"
        )
    for count in counts:
        for number in range(1, count + 1):
            if not (part_folder(out, (number, count)) / FINISHED).exists():
                raise DataError(
                    f"part {number} of {count} in {out} is not finished; run the same command with "
                    f"--shard {number}/{count} first"
                )
    return [path for _, path in sorted(found, key=lambda each: int(each[0][1]))]


def join_parts(out: Path, index: TokenIndex) -> None:
    """Move the shards of all parts to their folder and its index, then delete the parts.

    An interruption leaves the parts as they were or an index that names all of their items.
    """
    parts = find_parts(out)
    known = {song.id for song in index.songs}
    joined = replace(index, songs=list(index.songs))
    for folder in parts:
        part = read_index(folder)
        if part is None:
            continue
        if part.tokenizer_fingerprint != index.tokenizer_fingerprint:
            raise DataError(
                f"{folder} holds tokens of the tokenizer {part.tokenizer_fingerprint}, the others of "
                f"{index.tokenizer_fingerprint}; delete it and make that part again"
            )
        for number in range(part.shards):
            songs = [song for song in part.songs if song.shard == number and song.id not in known]
            if songs:
                target = joined.shards
                _copy_file(shard_path(folder, number), shard_path(out, target))
                joined.songs.extend(replace(song, shard=target) for song in songs)
                known.update(song.id for song in songs)
    if len(joined.songs) > len(index.songs):
        write_index(out, joined)
        index.songs[:] = joined.songs
    for folder in parts:
        shutil.rmtree(folder)


def _copy_file(source: Path, target: Path) -> None:
    """Put a file under a second name as well, by a hard link where the file system has them."""
    with whole_file(target) as temporary:
        temporary.unlink()
        try:
            os.link(source, temporary)
        except OSError:
            shutil.copyfile(source, temporary)
