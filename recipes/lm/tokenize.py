"""Turn a corpus into token shards for the language model.

Run: python -m duotok.recipes.lm.tokenize --tokenizer runs/small/stage3/final \\
         --manifest data/popband/train.jsonl --out data/tokens/train --workers 8
Run the same command again to go on after an interruption; --device cuda encodes on a GPU, --ray ADDRESS on
many machines that share a disk. Items that cannot be encoded are listed with their reasons in left_out.jsonl;
the others are encoded all the same, and the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.workers.pool import Workers, add_worker_options, take_workers, tell_left_out
from duotok.recipes.workers.processes import tell_reason
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError, DuoTokError
from duotok.tokenizer.common.files import write_text

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.lm.tokens import TokenIndex
    from duotok.tokenizer.model import DuoTokenizer

LEFT_OUT_FILE = "left_out.jsonl"
READ_AHEAD = 2  # batches of audio read while one is encoded
# What one damaged or odd item can raise, torch's errors on shapes and memory among them.
ITEM_ERRORS = (DuoTokError, RuntimeError, ValueError, OSError)


def open_index(folder: Path, tokenizer: DuoTokenizer) -> TokenIndex:
    """Return the folder's index, new or of an earlier run by the same tokenizer."""
    from duotok.lm.dual_track.layout import TRACKS
    from duotok.recipes.lm.tokens import TokenIndex, read_index

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


def cut_batches(items: Sequence[Item], size: int) -> list[list[Item]]:
    """Return the batches of a manifest.

    Items of like length go together, and always in the same company: the cut depends on the manifest only.
    """
    ordered = sorted(items, key=lambda item: (item.seconds, item.id))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def make_tokens(
    *,
    tokenizer: Path,
    manifest: Path,
    out: Path,
    batch: int,
    items_per_shard: int,
    device: str = "cpu",
    workers: Workers,
    threads: int | None = None,
) -> int:
    """Encode the items that no shard holds yet, the same by any number of workers; return how many there are.

    Raises DataError at the end where items were left out.
    """
    import torch
    from tqdm import tqdm

    from duotok.recipes.corpus.manifest import read_manifest, refuse_duplicates
    from duotok.recipes.lm.tokens import append_shard
    from duotok.tokenizer.model import DuoTokenizer

    if threads is not None and not workers.are_apart:
        torch.set_num_threads(threads)
    model = DuoTokenizer.from_pretrained(tokenizer).to(device)
    listed = read_manifest(manifest)
    refuse_duplicates(listed, manifest)
    batches = cut_batches(listed, batch)
    index = open_index(out, model)
    known = {song.id for song in index.songs}
    total = sum(len(each) for each in batches)
    pending = [rest for each in batches if (rest := [item for item in each if item.id not in known])]
    if workers.are_apart:
        encoded = encode_apart(pending, tokenizer, device=device, workers=workers, threads=threads or 1)
    else:
        encoded = encode_here(pending, model)
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
                append_shard(out, index, pairs)
                pairs = {}
        if pairs:
            append_shard(out, index, pairs)
    lines = [json.dumps({"id": name, "reason": why}, ensure_ascii=False) for name, why in left_out.items()]
    if lines:
        write_text(out / LEFT_OUT_FILE, "\n".join(lines) + "\n")
    else:
        (out / LEFT_OUT_FILE).unlink(missing_ok=True)
    if left_out:
        reasons = tell_left_out([f"{name}: {reason}" for name, reason in left_out.items()])
        raise DataError(
            f"{len(index.songs)} items are in {out}, {len(left_out)} were left out, see "
            f"{out / LEFT_OUT_FILE}: {reasons}"
        )
    return len(index.songs)


_tokenizer: DuoTokenizer | None = None  # one per worker process


def read_waves(items: Sequence[Item]) -> dict[str, list[Tensor]]:
    """Return the mono waves of a batch of items, by track."""
    from duotok.lm.dual_track.layout import TRACKS

    return {track: [item.read(track).mean(dim=0, keepdim=True) for item in items] for track in TRACKS}


def encode_waves(waves: list[Tensor], track: str, tokenizer: DuoTokenizer) -> list[Tensor]:
    """Return codes [frames] of waves [1, samples]; equally long waves are encoded side by side."""
    import torch

    device = next(tokenizer.parameters()).device
    groups: dict[int, list[int]] = {}
    for number, wave in enumerate(waves):
        groups.setdefault(wave.shape[1], []).append(number)
    codes: dict[int, Tensor] = {}
    for numbers in groups.values():
        batch = tokenizer.encode(torch.stack([waves[n] for n in numbers]).to(device), track).cpu()
        codes.update(zip(numbers, batch, strict=True))
    return [codes[number] for number in range(len(waves))]


def read_items(items: Sequence[Item]) -> list[dict[str, Tensor] | str]:
    """Return each item's waves by track, or the reason why it cannot be read."""
    found: list[dict[str, Tensor] | str] = []
    for item in items:
        try:
            found.append({track: waves[0] for track, waves in read_waves([item]).items()})
        except ITEM_ERRORS as error:
            found.append(tell_reason(error))
    return found


def encode_items(
    waves: Sequence[dict[str, Tensor] | str], tokenizer: DuoTokenizer
) -> list[dict[str, np.ndarray] | str]:
    """Return each item's codes [frames] int32 by track, or the reason why there are none."""
    import torch

    from duotok.lm.dual_track.layout import TRACKS

    found: list[dict[str, np.ndarray] | str] = [each if isinstance(each, str) else "" for each in waves]
    readable = [(number, each) for number, each in enumerate(waves) if not isinstance(each, str)]
    try:
        with torch.inference_mode():
            codes = {t: encode_waves([each[t] for _, each in readable], t, tokenizer) for t in TRACKS}
    except ITEM_ERRORS as error:
        if len(readable) == 1:
            found[readable[0][0]] = tell_reason(error)
        else:  # one of them is at fault: each goes alone
            for number, each in readable:
                found[number] = encode_items([each], tokenizer)[0]
        return found
    for place, (number, _) in enumerate(readable):
        pair = {track: codes[track][place].int().numpy() for track in TRACKS}
        lengths = [len(rows) for rows in pair.values()]
        is_whole = lengths[0] == lengths[1] > 0
        found[number] = pair if is_whole else f"the tracks have {lengths[0]} and {lengths[1]} frames"
    return found


def encode_here(
    batches: Sequence[list[Item]], tokenizer: DuoTokenizer
) -> Iterator[tuple[list[Item], list[dict[str, np.ndarray] | str]]]:
    """Yield every batch with what `encode_items` gives, reading ahead in threads."""
    with ThreadPoolExecutor(max_workers=READ_AHEAD) as pool:
        waiting = [pool.submit(read_items, batch) for batch in batches[:READ_AHEAD]]
        for number, batch in enumerate(batches):
            waves = waiting.pop(0).result()
            if number + READ_AHEAD < len(batches):
                waiting.append(pool.submit(read_items, batches[number + READ_AHEAD]))
            yield batch, encode_items(waves, tokenizer)


def encode_apart(
    batches: Iterable[list[Item]], folder: Path, *, device: str, workers: Workers, threads: int
) -> Iterator[tuple[list[Item], list[dict[str, np.ndarray] | str]]]:
    """Yield the same, in order; where a process dies, each item of its batch is tried again alone, last."""
    settings = {"start": _start_worker, "arguments": (folder.absolute(), device, threads)}
    suspects: list[list[Item]] = []
    for batch, found in workers.run(batches, _encode_batch, **settings):
        if not isinstance(found, str):
            yield batch, found
        elif len(batch) == 1:
            yield batch, [found]
        else:
            suspects += [[item] for item in batch]
    for batch, found in workers.run(suspects, _encode_batch, **settings):
        yield batch, [found] if isinstance(found, str) else found


def _start_worker(folder: Path, device: str, threads: int) -> None:
    global _tokenizer
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C ends it at once: the parent does the writing
    import torch

    from duotok.tokenizer.model import DuoTokenizer

    torch.set_num_threads(threads)
    _tokenizer = DuoTokenizer.from_pretrained(folder).to(device)


def _encode_batch(batch: list[Item]) -> list[dict[str, np.ndarray] | str]:
    assert _tokenizer is not None
    return encode_items(read_items(batch), _tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Token shards of a corpus, for the language model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--batch", type=int, default=4, help="items encoded side by side")
    parser.add_argument("--items-per-shard", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ... or mps")
    add_worker_options(parser)
    parser.add_argument("--threads", type=int, help="of each process (default: 1; of a single one: all)")
    arguments = parser.parse_args(argv)
    for name in ("batch", "items_per_shard", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")

    def make() -> None:
        values = vars(arguments)
        print(f"{make_tokens(workers=take_workers(values), **values)} items -> {arguments.out}")

    return guard(make)


if __name__ == "__main__":
    sys.exit(main())
