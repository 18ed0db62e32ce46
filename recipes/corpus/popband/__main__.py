"""Make the PopBand corpus: sung melodies of scores with a full band, as stems, mix and labels.

Run: python -m duotok.recipes.corpus.popband --songs pop909.tar.gz --out DIR --hours H --split train --seed S
Writes DIR/audio/SPLIT/ID/{vocal,drums,bass,other,mix}.wav and DIR/SPLIT.jsonl; run it again to go on.

With --tokens FOLDER --tokenizer TOKENIZER no audio is kept: every item is encoded as it is made, into token
shards as duotok.recipes.lm.tokenize writes them. DIR/SPLIT.jsonl has the scores and what the band plays.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import re
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.corpus.manifest import SPLITS, Item, append_items, read_manifest
from duotok.recipes.workers.pool import Workers, add_worker_options, take_workers
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError

if TYPE_CHECKING:
    import numpy as np

    from duotok.recipes.corpus.popband.rendering import Order

SHARD_SECONDS = 3_000.0  # of the items whose tokens are written together
MOST_FAILURES = 20  # songs that give no item, before the run asks whether any does


class Store:
    """The manifest of a split and, of items without audio, the token shards beside it."""

    def __init__(self, order: Order, tokens: Path | None) -> None:
        self.manifest, self.tokens = order.out / f"{order.split}.jsonl", tokens
        items = read_manifest(self.manifest) if self.manifest.exists() else []
        self.done = {item.id: item.seconds for item in items}
        if any(bool(item.mix) == bool(tokens) for item in items):
            kept = "without" if tokens is None else "with"
            raise DuoTokError(f"{self.manifest} has items {kept} audio; give another --out folder")
        self._pending: list[Item] = []
        self._pairs: dict[str, tuple] = {}
        if tokens is not None and order.tokenizer is not None:
            from duotok.recipes.lm.tokenize import open_index
            from duotok.tokenizer.model import DuoTokenizer

            self._index = open_index(tokens, DuoTokenizer.from_pretrained(order.tokenizer))
            known = {song.id for song in self._index.songs}
            if not known.issuperset(self.done):
                raise DuoTokError(
                    f"{tokens} has not all tokens of {self.manifest}; give the folder of the earlier run"
                )

    def add(self, item: Item, codes: dict[str, np.ndarray]) -> None:
        """Keep an item; what has no audio waits for others to share a shard with."""
        self._pending.append(item)
        if codes:
            import torch

            tensors = {track: torch.from_numpy(rows) for track, rows in codes.items()}
            self._pairs[item.id] = (item.song, item.split, tensors)
        if self.tokens is None or sum(each.seconds for each in self._pending) >= SHARD_SECONDS:
            self.write()

    def write(self) -> None:
        """Write what waits: first the tokens, so that an item in the manifest has all that belongs to it."""
        if self.tokens is not None:
            from duotok.recipes.lm.tokens import append_shard

            known = {song.id for song in self._index.songs}  # of a run that ended between the two
            pairs = {name: pair for name, pair in self._pairs.items() if name not in known}
            if pairs:
                append_shard(self.tokens, self._index, pairs)
        append_items(self.manifest, self._pending)
        self._pending, self._pairs = [], {}


def render_split(order: Order, seconds: float, workers: Workers, tokens: Path | None = None) -> int:
    """Render items in order until the split lasts `seconds`; returns the number of new items.

    tokens: folder of the token shards, of an order with a tokenizer.
    """
    from tqdm import tqdm

    from duotok.recipes.corpus.popband.rendering import make_item

    store, audio = Store(order, tokens), order.out / "audio" / order.split
    done = store.done
    total, new, failures = sum(done.values()), 0, 0
    for leftover in audio.glob("*.part"):
        shutil.rmtree(leftover)
    if total >= seconds:
        return 0
    count = order.count_items()
    ahead: set[int] = set()  # handed out, and not yet in the manifest

    def tasks() -> Iterator[int]:
        for index in itertools.count() if count is None else range(count):
            if order.item_id(index) not in done:
                ahead.add(index)
                yield index

    # The parent answers Ctrl-C.
    results = workers.run(
        tasks(),
        functools.partial(make_item, order),
        start=signal.signal,
        arguments=(signal.SIGINT, signal.SIG_IGN),
    )
    progress = tqdm(total=round(seconds), initial=round(total), unit="s", desc=order.split)
    try:
        with closing(results):
            for index, result in results:
                if isinstance(result, str):
                    failures += 1
                    progress.write(f"{order.item_id(index)} left out: {result}", file=sys.stderr)
                    if failures > MOST_FAILURES and failures > 5 * (new + len(done)):
                        raise DuoTokError(f"too many songs give no item; the last: {result}")
                    continue
                item, codes = result
                store.add(item, codes)
                ahead.discard(index)
                total += item.seconds
                new += 1
                progress.update(round(item.seconds))
                if total >= seconds:
                    break
    finally:
        store.write()
        progress.close()
        for index in ahead:
            shutil.rmtree(audio / order.item_id(index), ignore_errors=True)
    return new


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.corpus.popband",
        description="Make the PopBand corpus: sung melodies of scores with a full band.",
    )
    option = parser.add_argument
    option(
        "--songs", type=Path, required=True, help="folder or tar.gz of POP909, OpenEWLD or OpenScore Lieder"
    )
    option("--out", type=Path, required=True, help="folder of the corpus")
    option("--hours", type=float, required=True, help="length of the split")
    option("--split", choices=SPLITS, default="train")
    option("--seed", type=int, default=0)
    add_worker_options(parser, 2)
    option("--sound-font", type=Path, help="General MIDI .sf2 or .sf3 (default: an installed one)")
    option("--voice-cache", type=Path, help="folder of the analysed voices (default: OUT/voices)")
    option("--whole", action="store_true", help="whole songs of 2 to 5 minutes, each once, not excerpts")
    option(
        "--beats-per-bar", type=int, nargs="+", default=[], choices=(2, 3, 4, 6), metavar="N",
        help="songs of so many beats alone, such as 3 6, of which there are few",
    )  # fmt: skip
    option("--name", default="", help="part of the items' names, to use several corpora together")
    option("--grooves", type=Path, help="Groove MIDI folder or tar.gz: real drummers play in some items")
    option("--tokens", type=Path, metavar="FOLDER", help="keep token shards there, and no audio")
    option("--tokenizer", type=Path, metavar="FOLDER", help="tokenizer of --tokens")
    option("--phrases", type=int, default=60, help="spoken phrases analysed per voice")
    arguments = parser.parse_args(argv)
    if arguments.hours <= 0 or arguments.phrases < 1 or arguments.seed < 0:
        parser.error("--hours and --phrases must be positive, --seed not negative")
    if not re.fullmatch(r"\w*", arguments.name):
        parser.error("--name must be letters, digits and underscores")
    if arguments.whole and arguments.beats_per_bar:
        parser.error("--whole takes every song once, in any meter; leave --beats-per-bar out")
    if (arguments.tokens is None) != (arguments.tokenizer is None):
        parser.error("--tokens and --tokenizer belong together")

    def make() -> None:
        workers = take_workers(vars(arguments))
        from duotok.recipes.corpus.popband.rendering import Order, prepare_voices
        from duotok.recipes.corpus.scores.sources import open_songs
        from duotok.renderer.sound_font import find_sound_font

        order = Order(
            songs=arguments.songs,
            out=arguments.out,
            split=arguments.split,
            seed=arguments.seed,
            sound_font=find_sound_font(arguments.sound_font),
            voice_cache=arguments.voice_cache or arguments.out / "voices",
            phrases=arguments.phrases,
            whole=arguments.whole,
            name=arguments.name,
            grooves=arguments.grooves,
            tokenizer=arguments.tokenizer,
            meters=tuple(arguments.beats_per_bar),
        )
        open_songs(order.songs)  # says what is wrong with them before the voices are made
        prepare_voices(order.voice_cache, order.phrases, workers)
        new = render_split(order, arguments.hours * 3600, workers, arguments.tokens)
        print(f"{new} new items in {arguments.out / (arguments.split + '.jsonl')}")

    return guard(make)


if __name__ == "__main__":
    sys.exit(main())
