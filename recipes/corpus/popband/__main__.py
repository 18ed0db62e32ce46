"""Make the PopBand corpus: sung melodies of scores with a full band, as stems, mix and labels.

Run: python -m duotok.recipes.corpus.popband --songs pop909.tar.gz --out DIR --hours H --split train --seed S
Writes DIR/audio/SPLIT/ID/{vocal,drums,bass,other,mix}.wav and DIR/SPLIT.jsonl; run it again to go on.
"""

import argparse
import functools
import itertools
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.recipes.corpus.manifest import SPLITS, append_items, read_manifest
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError

if TYPE_CHECKING:
    from duotok.recipes.corpus.popband.rendering import Order

MOST_FAILURES = 20  # songs that give no item, before the run asks whether any does


def render_split(order: "Order", seconds: float, workers: int) -> int:
    """Render items in order until the split lasts `seconds`; returns the number of new items."""
    from tqdm import tqdm

    from duotok.recipes.corpus.popband.rendering import make_item
    from duotok.recipes.corpus.worker_pool import run_all

    manifest, audio = order.out / f"{order.split}.jsonl", order.out / "audio" / order.split
    done = {item.id: item.seconds for item in read_manifest(manifest)} if manifest.exists() else {}
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
    results = run_all(
        tasks(),
        functools.partial(make_item, order),
        workers=workers,
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
                append_items(manifest, [result])
                ahead.discard(index)
                total += result.seconds
                new += 1
                progress.update(round(result.seconds))
                if total >= seconds:
                    break
    finally:
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
    option("--workers", type=int, default=2, help="processes, each single-threaded")
    option("--sound-font", type=Path, help="General MIDI .sf2 or .sf3 (default: an installed one)")
    option("--voice-cache", type=Path, help="folder of the analysed voices (default: OUT/voices)")
    option("--whole", action="store_true", help="whole songs of 2 to 5 minutes, each once, not excerpts")
    option("--phrases", type=int, default=60, help="spoken phrases analysed per voice")
    arguments = parser.parse_args(argv)
    if arguments.hours <= 0 or arguments.workers < 1 or arguments.phrases < 1 or arguments.seed < 0:
        parser.error("--hours, --workers and --phrases must be positive, --seed not negative")

    def make() -> None:
        from duotok.recipes.corpus.popband.rendering import Order, find_sound_font, prepare_voices
        from duotok.recipes.corpus.scores.sources import open_songs

        order = Order(
            songs=arguments.songs,
            out=arguments.out,
            split=arguments.split,
            seed=arguments.seed,
            sound_font=find_sound_font(arguments.sound_font),
            voice_cache=arguments.voice_cache or arguments.out / "voices",
            phrases=arguments.phrases,
            whole=arguments.whole,
        )
        open_songs(order.songs)  # says what is wrong with them before the voices are made
        prepare_voices(order.voice_cache, order.phrases, arguments.workers)
        new = render_split(order, arguments.hours * 3600, arguments.workers)
        print(f"{new} new items in {arguments.out / (arguments.split + '.jsonl')}")

    return guard(make)


if __name__ == "__main__":
    sys.exit(main())
