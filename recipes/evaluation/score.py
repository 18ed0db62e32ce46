"""Measure a bundle on the test songs.

Run: python -m duotok.recipes.evaluation.score PART --corpus DIR [--bundle DIR] --out results.json
PART is one of MODULES, or all. Only DIR/test.jsonl is read; settings are chosen on --split validation. The
figures of PART are replaced in results.json, those of other parts stay; table.py makes a Markdown table of
them. "renderer --vae FOLDER" measures a VAE alone, before there is a bundle that holds it. The part quality
has a table and a picture of its own; "sweep --split validation" draws what settings do to generated sets;
"style --tokens DIR --manifest items.jsonl" asks for styles and hears whether they are played; "notes" with
the same options measures the score that is read out of codes; "codec --codec FOLDER" measures acoustic codecs
by number of levels; "singers --recordings FOLDER" accompanies recordings of real singers; "separation
--separator tokens=FOLDER --separator spleeter" compares separators.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard

if TYPE_CHECKING:
    from duotok.recipes.evaluation.excerpts import Settings

# The module in which measure_PART lies; imported only when the part is asked for.
_OTHERS = "separation lm renderer quality generate decoding long tuning continuation".split()
# Not of "all": they need a corpus, recordings or tokens of their own, or are for choosing settings.
_ALONE = ("whole", "tempo", "meter", "style", "notes", "sweep", "codec", "accompgen", "singers")
MODULES = {
    **dict.fromkeys(("tokenizer", "readouts", "encoding", "lyrics"), "tokenizer_part"),
    **{name: f"{name}_part" for name in (*_OTHERS, *_ALONE)},
}
PARTS = tuple(part for part in MODULES if part not in _ALONE)


def measure(part: str, settings: "Settings") -> dict[str, float]:
    """Figures of one part, named without the part; empty where the bundle has nothing to measure."""
    module = import_module(f"duotok.recipes.evaluation.{MODULES[part]}")
    return getattr(module, f"measure_{part}")(settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure a bundle on the test songs.")
    parser.add_argument("part", choices=(*MODULES, "all"))
    parser.add_argument("--corpus", type=Path, help="corpus folder with test.jsonl; singers: none")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the one in the package)")
    parser.add_argument("--out", type=Path, required=True, help="results.json to write or to update")
    parser.add_argument(
        "--split", choices=("test", "validation"), default="test", help="validation: to choose settings by"
    )
    parser.add_argument("--items", type=int, help="number of test items")
    parser.add_argument("--seconds", type=float, help="seconds of each excerpt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--track", choices=("vocal", "accompaniment"), help="quality: this track alone")
    parser.add_argument("--real-stems", type=Path, help="separation: folder with a real song's four stems")
    parser.add_argument(
        "--recordings",
        type=Path,
        help="renderer: folder of real recordings to put through the VAE; singers: folder with "
        "vocal/NAME.wav, accompaniment/NAME.wav and SYSTEM/NAME.wav of each system to compare with",
    )
    parser.add_argument(
        "--vae", type=Path, help="renderer: measure this VAE alone, in place of the bundle's renderer"
    )
    parser.add_argument(
        "--codec", action="append", help="codec: an acoustic codec's folder or hub id; any number of them"
    )
    parser.add_argument(
        "--tokens",
        type=Path,
        help="style, notes: folder of training tokens, of which held-out songs are measured",
    )
    parser.add_argument("--manifest", type=Path, help="of these tokens (default: the corpus' train.jsonl)")
    parser.add_argument(
        "--musdb", type=Path, help="accompgen: folder of MUSDB18-HQ, with test/TRACK/vocals.wav"
    )
    text = "separation: compare this separator, too, with these weights; any number of them"
    parser.add_argument("--separator", action="append", metavar="NAME[=CHECKPOINT]", help=text)
    text = "separation: judge by ViSQOL, too (package visqol-python), which takes long"
    parser.add_argument("--visqol", action="store_true", help=text)
    parser.add_argument("--no-speed", dest="speed", action="store_false", help="leave out speed and memory")
    parser.add_argument(
        "--no-sound",
        dest="sound",
        action="store_false",
        help="decoding, long, whole: codes only; codec: no DuoTok",
    )
    parser.add_argument(
        "--plan-only", dest="composed", action="store_false", help="whole: plans only, nothing composed"
    )
    parser.add_argument("--plots", type=Path, help="decoding, whole: folder for pictures")
    parser.add_argument(
        "--folder", type=Path, help="quality, sweep, whole: of tables, pictures (default: named so, at --out)"
    )
    arguments = parser.parse_args(argv)
    if arguments.corpus is None and arguments.part != "singers":
        parser.error("--corpus is required")

    def run() -> None:
        from duotok.recipes.accompany.bundle import default_bundle
        from duotok.recipes.evaluation.excerpts import Settings
        from duotok.recipes.evaluation.results import merge_results

        options = {
            name: value
            for name, value in vars(arguments).items()
            if name not in ("part", "out", "codec", "separator")
        }
        options["bundle"] = arguments.bundle or default_bundle()
        options["corpus"] = arguments.corpus or Path()
        options["separators"] = tuple(arguments.separator or ())
        settings = Settings(**options, codecs=tuple(arguments.codec or ()))
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            figures = measure(part, replace(settings, folder=arguments.folder or arguments.out.parent / part))
            merge_results(arguments.out, part, figures)
            for name, value in sorted(figures.items()):
                print(f"{part}.{name} = {value:.4g}")

    return guard(run, interrupted="the figures of finished parts are kept")


if __name__ == "__main__":
    sys.exit(main())
