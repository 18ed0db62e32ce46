"""Measure a bundle on the test songs.

Run: python -m duotok.recipes.evaluation.score PART --corpus DIR [--bundle DIR] --out results.json
PART is tokenizer, lm, renderer, generate or all. DIR/test.jsonl is what is read, nothing else. The figures of
PART are replaced in results.json, those of other parts stay; table.py makes a Markdown table of the file.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.recipes.evaluation.settings import Settings
from duotok.tokenizer.common.errors import DuoTokError

PARTS = ("tokenizer", "lm", "renderer", "generate")


def measure(part: str, settings: Settings) -> dict[str, float]:
    """Figures of one part, named without the part."""
    if part == "tokenizer":
        from duotok.recipes.evaluation.tokenizer_part import measure_tokenizer

        return measure_tokenizer(settings)
    if part == "lm":
        from duotok.recipes.evaluation.lm_part import measure_lm

        return measure_lm(settings)
    if part == "renderer":
        from duotok.recipes.evaluation.renderer_part import measure_renderer

        return measure_renderer(settings)
    from duotok.recipes.evaluation.generate_part import measure_generate

    return measure_generate(settings)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Measure a bundle on the test songs.")
    parser.add_argument("part", choices=(*PARTS, "all"))
    parser.add_argument("--corpus", type=Path, required=True, help="corpus folder with test.jsonl")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the one in the package)")
    parser.add_argument("--out", type=Path, required=True, help="results.json to write or to update")
    parser.add_argument("--items", type=int, help="number of test items")
    parser.add_argument("--seconds", type=float, help="seconds of each excerpt")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-speed", action="store_true", help="generate: leave out speed and memory")
    arguments = parser.parse_args(argv)
    from duotok.recipes.bundle import default_bundle
    from duotok.recipes.evaluation.results import merge_results

    try:
        settings = Settings(
            corpus=arguments.corpus,
            bundle=arguments.bundle or default_bundle(),
            items=arguments.items,
            seconds=arguments.seconds,
            seed=arguments.seed,
            speed=not arguments.no_speed,
        )
        for part in PARTS if arguments.part == "all" else (arguments.part,):
            figures = measure(part, settings)
            merge_results(arguments.out, part, figures)
            for name, value in sorted(figures.items()):
                print(f"{part}.{name} = {value:.4g}")
    except DuoTokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
