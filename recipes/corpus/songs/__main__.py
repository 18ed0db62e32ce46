"""Make a corpus from recordings: pseudo-stems, voice activity, cuts at sentence boundaries, one manifest.

Run: python -m duotok.recipes.corpus.songs --songs FOLDER_OR_LIST --out data/songs --workers 4
Writes OUT/audio/SPLIT/ID/{vocal,drums,bass,other,mix}.flac, OUT/SPLIT.jsonl and OUT/left_out.jsonl; run it
again to go on. --ray ADDRESS works on many machines that share a disk.
"""

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.workers.pool import Workers, add_worker_options, take_workers, tell_left_out
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError

if TYPE_CHECKING:
    from duotok.recipes.corpus.songs.maker import SongRecord, SongsConfig
    from duotok.recipes.corpus.songs.recordings import SongFile

LEAST_FREE_BYTES = 1_000_000_000


def make_corpus(
    songs: "Sequence[SongFile]",
    out: Path,
    config: "SongsConfig",
    *,
    device: str = "cpu",
    workers: Workers,
) -> "list[SongRecord]":
    """Make what is missing and write the manifests; return the records that they hold."""
    import torch
    from tqdm import tqdm

    from duotok.recipes.corpus.songs import maker
    from duotok.recipes.separation.adapters import open_separator

    maker.check_settings(out, asdict(config))
    pending = [song for song in songs if maker.read_record(out, song) is None]
    if any(not song.stems for song in pending):
        open_separator(config.separator, config.checkpoint, device)  # a missing one ends the run at once
    progress = tqdm(total=len(songs), initial=len(songs) - len(pending), unit="song", desc="songs")

    def tasks() -> "Iterator[SongFile]":
        for song in pending:
            if shutil.disk_usage(out).free < LEAST_FREE_BYTES:
                raise DataError(f"less than 1 GB is free in {out}; make room and run the same command again")
            yield song

    threads = 1 if workers.are_apart else torch.get_num_threads()
    arguments = (config, out.absolute(), device, threads)
    try:
        for song, result in workers.run(
            tasks(), maker.make_song, start=maker.start_worker, arguments=arguments
        ):
            if isinstance(result, str):
                result = maker.SongRecord(
                    song=song.name, signature=song.signature, reason=result, is_final=False
                )
                maker.write_record(out, song, result)
            for text in (result.reason, *(reason for _, reason in result.notes)):
                if text:
                    progress.write(f"{song.name}: left out: {text}", sys.stderr)
            progress.update()
    finally:
        progress.close()
        found = maker.read_records(out)
        maker.write_manifests(out, found)
    return found


def summary(records: "Sequence[SongRecord]", out: Path) -> str:
    """The closing line: what was made, and what was left out for which reasons."""
    items = [item for record in records for item in record.items]
    sung = sum(bool(item.lyrics) for item in items)
    worded = sum(any(line[2] for line in item.lyrics) for item in items)
    hours = sum(item.seconds for item in items) / 3600
    text = (
        f"{sum(bool(record.items) for record in records)} songs, {len(items)} cuts, {hours:.2f} h in {out}: "
        f"{sung} sung ({worded} with words), {len(items) - sung} instrumental"
    )
    reasons = [record.reason for record in records if record.reason]
    reasons += [reason for record in records for _, reason in record.notes]
    if reasons:
        text += f"; {len(reasons)} left out, see left_out.jsonl: {tell_left_out(reasons)}"
    return text


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.corpus.songs",
        description="Make a corpus from recordings: stems, voice activity, cuts at sentence boundaries.",
    )
    option = parser.add_argument
    option("--songs", type=Path, required=True, help="folder of recordings, or a text list of them")
    option("--out", type=Path, required=True, help="folder of the corpus")
    option("--separator", default="mask-head", help="mask-head, demucs, bs-roformer or spleeter")
    option("--checkpoint", help="of the separator: a file, a folder or a name on the hub")
    option("--whisper", metavar="FOLDER", help="faster-whisper model for songs without a transcript")
    option("--language", help="of the lyrics, for --whisper (default: heard)")
    option("--shortest", type=float, default=5.0, help="seconds of a cut")
    option("--longest", type=float, default=30.0, help="seconds of a cut")
    option(
        "--validation",
        dest="validation_share",
        type=float,
        default=0.05,
        help="share of the songs for validation",
    )
    option("--test", dest="test_share", type=float, default=0.05, help="share of the songs for the test")
    add_worker_options(parser, 2)
    option("--shards", type=Path, metavar="FOLDER", help="also pack the cuts into tars, for the tokenizer")
    option("--shard-mb", type=int, default=500, help="size of a tar")
    option("--device", default="cpu", help="of the separator: cpu, cuda")
    arguments = parser.parse_args(argv)
    if arguments.shard_mb < 1:
        parser.error("--shard-mb must be positive")
    return guard(lambda: _run(arguments), interrupted="the same command goes on from here")


def _run(arguments: argparse.Namespace) -> None:
    from duotok.recipes.corpus.shards import pack_items
    from duotok.recipes.corpus.songs.maker import SongsConfig
    from duotok.recipes.corpus.songs.recordings import find_songs
    from duotok.recipes.corpus.songs.segments import SegmentConfig

    same = ("separator", "checkpoint", "whisper", "language", "validation_share", "test_share")
    config = SongsConfig(
        **{name: getattr(arguments, name) for name in same},
        segments=SegmentConfig(shortest_seconds=arguments.shortest, longest_seconds=arguments.longest),
    )
    # What is missing is found out here, once, and not by every song.
    if config.whisper is not None:
        from duotok.recipes.corpus.songs.transcripts import WhisperRecognizer

        WhisperRecognizer(config.whisper, arguments.device)
    workers, songs = take_workers(vars(arguments)), find_songs(arguments.songs)
    found = make_corpus(songs, arguments.out, config, device=arguments.device, workers=workers)
    if arguments.shards is not None:
        items = [item for record in found for item in record.items]
        tars = pack_items(items, arguments.shards, megabytes=arguments.shard_mb, workers=workers)
        print(f"{len(tars)} new tars in {arguments.shards}")
    if not any(record.items for record in found):
        raise DataError(f"no recording gives a cut: {summary(found, arguments.out)}")
    print(summary(found, arguments.out))


if __name__ == "__main__":
    sys.exit(main())
