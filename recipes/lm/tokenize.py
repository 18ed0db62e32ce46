"""Turn a corpus into token shards for the language model.

Run: python -m duotok.recipes.lm.tokenize --tokenizer runs/small/stage3/final \\
         --manifest data/popband/train.jsonl --out data/tokens/train
Run the same command again to go on after an interruption; --device cuda encodes on a GPU.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.command import guard

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.lm.token_shards import TokenIndex
    from duotok.tokenizer.model import DuoTokenizer

READ_AHEAD = 2  # batches of audio read while one is encoded


def read_waves(items: "Sequence[Item]") -> "dict[str, list[Tensor]]":
    """Return the mono waves of a batch of items, by track."""
    from duotok.lm.layout import TRACKS

    return {track: [item.read(track).mean(dim=0, keepdim=True) for item in items] for track in TRACKS}


def encode_waves(waves: "list[Tensor]", track: str, tokenizer: "DuoTokenizer") -> "list[Tensor]":
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


def open_index(folder: Path, tokenizer: "DuoTokenizer") -> "TokenIndex":
    """Return the folder's index, new or of an earlier run by the same tokenizer."""
    from duotok.lm.layout import TRACKS
    from duotok.recipes.lm.token_shards import TokenIndex, read_index
    from duotok.tokenizer.common.errors import DataError

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


def tokenize(arguments: argparse.Namespace) -> int:
    """Encode the items that no shard holds yet; return how many items the folder then has."""
    import torch
    from tqdm import tqdm

    from duotok.lm.layout import TRACKS
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.lm.token_shards import append_shard
    from duotok.tokenizer.model import DuoTokenizer

    tokenizer = DuoTokenizer.from_pretrained(arguments.tokenizer).to(arguments.device)
    index = open_index(arguments.out, tokenizer)
    known = {song.id for song in index.songs}
    # Items of like length go together, so that they can be encoded side by side.
    items = [item for item in read_manifest(arguments.manifest) if item.id not in known]
    items.sort(key=lambda item: (item.seconds, item.id))
    pairs: dict = {}
    with torch.inference_mode(), tqdm(total=len(items), unit="item", disable=None) as progress:
        for batch, waves in _read_ahead(items, arguments.batch):
            codes = {track: encode_waves(waves[track], track, tokenizer) for track in TRACKS}
            for number, item in enumerate(batch):
                pairs[item.id] = (item.song, item.split, {t: codes[t][number] for t in TRACKS})
            progress.update(len(batch))
            if len(pairs) >= arguments.items_per_shard:
                append_shard(arguments.out, index, pairs)
                pairs = {}
        if pairs:
            append_shard(arguments.out, index, pairs)
    return len(index.songs)


def _read_ahead(items: "list[Item]", batch: int) -> "Iterator[tuple[list[Item], dict[str, list[Tensor]]]]":
    from concurrent.futures import ThreadPoolExecutor

    batches = [items[first : first + batch] for first in range(0, len(items), batch)]
    with ThreadPoolExecutor(max_workers=READ_AHEAD) as pool:
        waiting = [pool.submit(read_waves, part) for part in batches[:READ_AHEAD]]
        for number, part in enumerate(batches):
            waves = waiting.pop(0).result()
            if number + READ_AHEAD < len(batches):
                waiting.append(pool.submit(read_waves, batches[number + READ_AHEAD]))
            yield part, waves


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Token shards of a corpus, for the language model")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--batch", type=int, default=4, help="items encoded side by side")
    parser.add_argument("--items-per-shard", type=int, default=64)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    arguments = parser.parse_args(argv)
    if arguments.batch < 1 or arguments.items_per_shard < 1:
        parser.error("--batch and --items-per-shard must be at least 1")
    return guard(lambda: print(f"{tokenize(arguments)} items -> {arguments.out}"))


if __name__ == "__main__":
    sys.exit(main())
