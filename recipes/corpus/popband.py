"""Make the PopBand corpus: sung POP909 melodies with a full band, as stems, mix and labels.

Run: python -m duotok.recipes.corpus.popband --songs pop909.tar.gz --out DIR --hours H --split train --seed S
Writes DIR/audio/SPLIT/ID/{vocal,drums,bass,other,mix}.wav and DIR/SPLIT.jsonl; run it again to go on.
"""

import argparse
import shutil
import signal
import sys
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from duotok.recipes.corpus.manifest import SPLITS, Item, append_items, read_manifest
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError


@dataclass(frozen=True, kw_only=True)
class Order:
    """What a worker needs to render any item of a split."""

    songs: Path
    out: Path
    split: str
    seed: int
    sound_font: Path
    voice_cache: Path
    phrases: int


def item_id(split: str, index: int) -> str:
    """Name of an item."""
    return f"{split}-{index:05d}"


_maker = None  # one per worker process


def _start_worker(order: Order) -> None:
    global _maker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent answers Ctrl-C
    from duotok.recipes.corpus.rendering import ItemMaker

    _maker = ItemMaker(
        songs=order.songs,
        out=order.out,
        split=order.split,
        seed=order.seed,
        sound_font=order.sound_font,
        voice_cache=order.voice_cache,
        phrases=order.phrases,
    )


def _make_item(index: int) -> Item | str:
    """The finished item, or the reason why its song gives none."""
    assert _maker is not None
    try:
        return _maker.make(index)
    except DuoTokError as error:
        return str(error)


def render_split(order: Order, seconds: float, workers: int) -> int:
    """Render items in order until the split lasts `seconds`; returns the number of new items."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor

    from tqdm import tqdm

    manifest = order.out / f"{order.split}.jsonl"
    done = {item.id: item.seconds for item in read_manifest(manifest)} if manifest.exists() else {}
    total, new, failures, index = sum(done.values()), 0, 0, 0
    for leftover in (order.out / "audio" / order.split).glob("*.part"):
        shutil.rmtree(leftover)
    if total >= seconds:
        return 0
    pool = ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_start_worker, initargs=(order,)
    )
    waiting: deque = deque()
    progress = tqdm(total=round(seconds), initial=round(total), unit="s", desc=order.split)
    try:
        while total < seconds:
            while len(waiting) < workers + 1:
                if item_id(order.split, index) not in done:
                    waiting.append((index, pool.submit(_make_item, index)))
                index += 1
            number, future = waiting.popleft()
            result = future.result()
            if isinstance(result, str):
                failures += 1
                progress.write(f"{item_id(order.split, number)} left out: {result}", file=sys.stderr)
                if failures > 20 and failures > 5 * (new + len(done)):
                    raise DuoTokError(f"too many songs give no item; the last: {result}")
                continue
            append_items(manifest, [result])
            total += result.seconds
            new += 1
            progress.update(round(result.seconds))
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
        progress.close()
        for number, _ in waiting:  # rendered ahead, but not in the manifest
            shutil.rmtree(
                order.out / "audio" / order.split / item_id(order.split, number), ignore_errors=True
            )
    return new


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.corpus.popband",
        description="Make the PopBand corpus: sung POP909 melodies with a full band.",
    )
    parser.add_argument("--songs", type=Path, required=True, help="POP909 folder or tar.gz")
    parser.add_argument("--out", type=Path, required=True, help="folder of the corpus")
    parser.add_argument("--hours", type=float, required=True, help="length of the split")
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="processes, each single-threaded")
    parser.add_argument(
        "--sound-font", type=Path, help="General MIDI .sf2 or .sf3 (default: an installed one)"
    )
    parser.add_argument(
        "--voice-cache", type=Path, help="folder of the analysed voices (default: OUT/voices)"
    )
    parser.add_argument("--phrases", type=int, default=60, help="spoken phrases analysed per voice")
    arguments = parser.parse_args(argv)
    if arguments.hours <= 0 or arguments.workers < 1 or arguments.phrases < 1 or arguments.seed < 0:
        parser.error("--hours, --workers and --phrases must be positive, --seed not negative")

    def make() -> None:
        from duotok.recipes.corpus.rendering import prepare_voices
        from duotok.recipes.corpus.soundfont import find_sound_font

        order = Order(
            songs=arguments.songs,
            out=arguments.out,
            split=arguments.split,
            seed=arguments.seed,
            sound_font=find_sound_font(arguments.sound_font),
            voice_cache=arguments.voice_cache or arguments.out / "voices",
            phrases=arguments.phrases,
        )
        if not order.songs.exists():
            raise DuoTokError(f"{order.songs} does not exist; give the POP909 folder or tar.gz")
        prepare_voices(order.voice_cache, order.phrases, arguments.workers)
        new = render_split(order, arguments.hours * 3600, arguments.workers)
        print(f"{new} new items in {arguments.out / (arguments.split + '.jsonl')}")

    return guard(make)


if __name__ == "__main__":
    sys.exit(main())
