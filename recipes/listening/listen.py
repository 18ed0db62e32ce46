"""listen: a blinded listening test in one HTML file, and mean opinion scores of the ratings that come back.

Run: listen sounds --corpus data/popband --out sounds
     listen page --sounds sounds --out listen.html
     listen score ratings-*.csv --key listen.key.json --out mos
     (or python -m duotok.recipes.listening.listen ...)
"""

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import add_completion, guard

SYSTEMS = ("original", "vae", "round_trip", "generated")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="listen", description="Makes a blinded listening test (MOS, 1 to 5) and scores its ratings."
    )
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True)
    sounds = commands.add_parser("sounds", help="make sounds from a corpus: originals and what a model makes")
    sounds.add_argument("--corpus", type=Path, required=True, help="corpus folder with test.jsonl")
    sounds.add_argument("--bundle", type=Path, help="model bundle (default: the one in the package)")
    sounds.add_argument("--track", choices=("accompaniment", "vocal"), default="accompaniment")
    sounds.add_argument("--items", type=int, default=6, help="number of excerpts (default: 6)")
    sounds.add_argument("--seconds", type=float, default=8.0, help="of each excerpt (default: 8)")
    sounds.add_argument("--seed", type=int, default=0)
    sounds.add_argument("--out", type=Path, required=True, help="folder that gets a folder per system")
    page = commands.add_parser("page", help="write the page, and beside it the key to what was what")
    page.add_argument("--sounds", type=Path, required=True, help="folder of SYSTEM/CLIP.wav (FLAC, OGG, MP3)")
    page.add_argument("--out", type=Path, default=Path("listen.html"), help="default: listen.html")
    page.add_argument("--title", default="Listening test", help="heading that listeners see")
    page.add_argument("--seconds", type=float, default=10.0, help="longest part of a clip (default: 10)")
    page.add_argument("--seed", type=int, default=0, help="of the order of the clips")
    score = commands.add_parser("score", help="mean opinion scores of ratings files, with 95 %% intervals")
    score.add_argument("ratings", type=Path, nargs="+", metavar="CSV", help="files that listeners saved")
    score.add_argument("--key", type=Path, required=True, help="the .key.json written beside the page")
    score.add_argument("--out", type=Path, default=Path("mos"), help="folder of mos.md, .json, .png")
    score.add_argument("--seed", type=int, default=0, help="of the intervals' draws")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = build_parser().parse_args(argv)
    run = {"sounds": _make_sounds, "page": _make_page, "score": _score}[arguments.command]
    return guard(lambda: run(arguments))


def _make_sounds(arguments: argparse.Namespace) -> None:
    """Write OUT/SYSTEM/ITEM.wav of each excerpt; nothing is generated but accompaniments."""
    from tqdm import tqdm

    from duotok.recipes.accompany.bundle import default_bundle
    from duotok.recipes.evaluation.excerpts import choose_excerpts, read_split
    from duotok.recipes.evaluation.quality_part import SoundMaker
    from duotok.tokenizer.common.audio import write_audio
    from duotok.tokenizer.common.errors import ConfigError, DataError

    if arguments.items < 2 or arguments.seconds < 4:
        raise ConfigError("--items must be at least 2, for mismatched pairs, and --seconds at least 4")
    bundle, track = arguments.bundle or default_bundle(), arguments.track
    items, length = read_split(arguments.corpus), arguments.seconds
    excerpts = choose_excerpts(items, count=arguments.items, seconds=length, seed=arguments.seed)
    maker = SoundMaker(bundle, arguments.seed)
    if track not in maker.rendered_tracks:
        known = " and ".join(maker.rendered_tracks)
        raise DataError(f"{bundle} has no decoder of the {track}; it has one of the {known}")
    systems: dict[str, None] = {}
    for number, excerpt in enumerate(tqdm(excerpts, desc="sounds", disable=None)):
        made, _ = maker.make(excerpt, excerpt, track, number)
        for system in (system for system in SYSTEMS if system in made):
            # Codes do not know a recording's level: what comes out may exceed full scale.
            wave = made[system] / max(1.0, float(made[system].abs().max()))
            write_audio(arguments.out / system / f"{excerpt.item.id}.wav", wave)
            systems[system] = None
    print(f"{arguments.out}: {', '.join(systems)}")


def _make_page(arguments: argparse.Namespace) -> None:
    from duotok.recipes.listening.page import PageSettings, key_path, write_page

    settings = PageSettings(title=arguments.title, seconds=arguments.seconds, seed=arguments.seed)
    key = write_page(arguments.sounds, arguments.out, settings)
    told = f"{len(key.stimuli)} clips of {len(key.systems)} systems, {key.loudness_lufs:g} LUFS"
    print(f"{arguments.out}: {told}, {arguments.out.stat().st_size / 1e6:.1f} MB")
    print(f"{key_path(arguments.out)}: what was what; keep it from the listeners")


def _score(arguments: argparse.Namespace) -> None:
    from duotok.recipes.listening.page import read_key
    from duotok.recipes.listening.scores import read_ratings, render_table, score_systems, write_report

    key = read_key(arguments.key)
    ratings = read_ratings(arguments.ratings, key)
    for rater, count in Counter(rating.rater for rating in ratings).items():
        if missing := len(key.stimuli) - count:
            print(f"warning: {rater} left {missing} of {len(key.stimuli)} clips unrated", file=sys.stderr)
    opinions = score_systems(ratings, seed=arguments.seed)
    write_report(opinions, arguments.out, key.page)
    print(render_table(opinions), end="")


if __name__ == "__main__":
    sys.exit(main())
