"""Turn a corpus into token shards for the language model.

Run: python -m duotok.recipes.lm.tokenize --tokenizer runs/small/stage3/final \\
         --manifest data/popband/train.jsonl --out data/tokens/train --workers 8
Run the same command again to go on after an interruption; --device cuda encodes on a GPU. On several
machines or GPUs that share a disk give each its own --shard 1/8, 2/8, ...: they write OUT/part-1-of-8 and so
on, and the same command without --shard then joins them. Items that cannot be encoded are listed with their
reasons in left_out.jsonl; the others are encoded all the same, and the exit code is 1.
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_text

if TYPE_CHECKING:
    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.lm.token_shards import TokenIndex
    from duotok.tokenizer.model import DuoTokenizer

LEFT_OUT_FILE = "left_out.jsonl"
SHOWN_REASONS = 3


def open_index(folder: Path, tokenizer: "DuoTokenizer") -> "TokenIndex":
    """Return the folder's index, new or of an earlier run by the same tokenizer."""
    from duotok.lm.dual_track.layout import TRACKS
    from duotok.recipes.lm.token_shards import TokenIndex, read_index

    found = read_index(folder)
    if found is None:
        return TokenIndex(
            tokenizer_fingerprint=str(tokenizer.fingerprint),
            codebook_sizes={track: tokenizer.codebook_size(track) for track in TRACKS},
            frame_rate_hz=tokenizer.frame_rate_hz,
        )
    if found.tokenizer_fingerprint != str(tokenizer.fingerprint):
        raise DataError(
            f"{folder} holds tokens of the tokenizer {found.tokenizer_fingerprint}, not of "
            f"{tokenizer.fingerprint}; give another --out folder or delete it"
        )
    return found


def cut_batches(items: "Sequence[Item]", size: int, part: tuple[int, int] | None) -> "list[list[Item]]":
    """Return the batches of a manifest, or every N-th of them for part (number from 1 on, N).

    Items of like length go together, so that they can be encoded side by side. The cut depends on the
    manifest only: however the work is divided or interrupted, an item is encoded in the same company.
    """
    ordered = sorted(items, key=lambda item: (item.seconds, item.id))
    batches = [ordered[first : first + size] for first in range(0, len(ordered), size)]
    return batches if part is None else batches[part[0] - 1 :: part[1]]


def make_tokens(
    *,
    tokenizer: Path,
    manifest: Path,
    out: Path,
    batch: int,
    items_per_shard: int,
    device: str = "cpu",
    workers: int = 1,
    threads: int | None = None,
    shard: tuple[int, int] | None = None,
) -> int:
    """Encode the items that no shard holds yet; return how many items the folder then has.

    Any number of workers writes the same. Raises DataError at the end where items were left out.
    """
    import torch
    from tqdm import tqdm

    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.lm.token_encoding import encode_here, encode_in_processes
    from duotok.recipes.lm.token_parts import join_parts, mark_finished, part_folder
    from duotok.recipes.lm.token_shards import append_shard
    from duotok.tokenizer.model import DuoTokenizer

    if threads is not None and workers == 1:
        torch.set_num_threads(threads)
    model = DuoTokenizer.from_pretrained(tokenizer).to(device)
    batches = cut_batches(read_manifest(manifest), batch, shard)
    folder = out if shard is None else part_folder(out, shard)
    index = open_index(folder, model)
    if shard is None:
        join_parts(out, index)
    known = {song.id for song in index.songs}
    total = sum(len(each) for each in batches)
    pending = [rest for each in batches if (rest := [item for item in each if item.id not in known])]
    if shard is not None and pending:
        mark_finished(folder, False)
    if workers == 1:
        encoded = encode_here(pending, model)
    else:
        encoded = encode_in_processes(
            pending, tokenizer, device=device, workers=workers, threads=threads or 1
        )
    left_out: dict[str, str] = {}
    pairs: dict = {}
    done = total - sum(len(each) for each in pending)
    with tqdm(total=total, initial=done, unit="item", desc="tokens", disable=None) as progress:
        for items, found in encoded:
            for item, codes in zip(items, found, strict=True):
                if isinstance(codes, str):
                    left_out[item.id] = codes
                    progress.write(f"{item.id}: left out: {codes}", sys.stderr)
                else:
                    tensors = {track: torch.from_numpy(rows) for track, rows in codes.items()}
                    pairs[item.id] = (item.song, item.split, tensors)
            progress.update(len(items))
            if len(pairs) >= items_per_shard:
                append_shard(folder, index, pairs)
                pairs = {}
        if pairs:
            append_shard(folder, index, pairs)
    write_left_out(folder, left_out)
    if shard is not None:
        mark_finished(folder, True)
    if left_out:
        shown = "; ".join(f"{name}: {reason}" for name, reason in list(left_out.items())[:SHOWN_REASONS])
        more = f"; and {len(left_out) - SHOWN_REASONS} more" if len(left_out) > SHOWN_REASONS else ""
        raise DataError(
            f"{len(index.songs)} items are in {folder}, {len(left_out)} were left out, see "
            f"{folder / LEFT_OUT_FILE}: {shown}{more}"
        )
    return len(index.songs)


def write_left_out(folder: Path, left_out: dict[str, str]) -> None:
    """Write the items that were left out and why, one line of JSON each; no file where there are none."""
    path = folder / LEFT_OUT_FILE
    if not left_out:
        path.unlink(missing_ok=True)
        return
    lines = [json.dumps({"id": name, "reason": why}, ensure_ascii=False) for name, why in left_out.items()]
    write_text(path, "\n".join(lines) + "\n")


def tokenize(arguments: argparse.Namespace) -> int:
    """Encode what the arguments of `make_tokens` say; return how many items the folder then has."""
    return make_tokens(**vars(arguments))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.lm.tokenize",
        description="Token shards of a corpus, for the language model",
    )
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--batch", type=int, default=4, help="items encoded side by side")
    parser.add_argument("--items-per-shard", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... or mps")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--threads", type=int, help="of each process (default: 1; of a single one: all)")
    parser.add_argument("--shard", type=_shard, metavar="I/N", help="encode only part I of N, I from 1 on")
    arguments = parser.parse_args(argv)
    for name in ("batch", "items_per_shard", "workers", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    return guard(lambda: print(f"{tokenize(arguments)} items -> {arguments.out}"))


def _shard(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match.group(1)) <= int(match.group(2)):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 1 to N, for example 1/8")
    return int(match.group(1)), int(match.group(2))


if __name__ == "__main__":
    sys.exit(main())
