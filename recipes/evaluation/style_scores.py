"""What candidates in each style score in the mean, so that none is kept for being in an easy style.

Run: python -m duotok.recipes.evaluation.style_scores --corpus data/popband [--bundle DIR] --out scores.json
Composes for validation singers in every style that is usual in their meter; nothing is rendered. The file is
for `duotok.recipes.accompany.bundle --style-scores`. Measure anew for every language model.
"""

import argparse
import sys
from collections import defaultdict
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from duotok.recipes.accompany.bundle import default_bundle
from duotok.recipes.accompany.pipeline import Accompanist
from duotok.recipes.evaluation.excerpts import Settings, excerpts_of
from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json


def measure_style_scores(settings: Settings) -> dict[str, float]:
    """{style: mean score}; ConfigError for a model that knows no styles."""
    accompanist = Accompanist.from_pretrained(settings.bundle)
    band = accompanist.bundle.lm.band
    if band is None:
        raise ConfigError(f"{settings.bundle} knows no styles, so that there is nothing to measure")
    found: dict[str, list[float]] = defaultdict(list)
    excerpts = excerpts_of(settings, 48, 12.0, per_item=2)
    for number, excerpt in enumerate(tqdm(excerpts, desc="singers", disable=None)):
        # As many candidates as styles: each is drawn once before one comes again.
        sketches = accompanist.compose(
            excerpt.read("vocal"), seed=settings.seed + number, candidates=len(band.styles)
        )
        for composition in sketches.ranked:
            score = composition.fit.score + (composition.fit.usual_score or 0.0)
            found[composition.style or ""].append(score)
    return {style: round(fmean(scores), 4) for style, scores in sorted(found.items())}


def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description="Mean score of candidates in each style.")
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="corpus folder with validation.jsonl")
    add("--bundle", type=Path, help="model bundle (default: the one in the package)")
    add("--out", type=Path, required=True, help="JSON file to write")
    add("--items", type=int, help="number of singers (default: 48)")
    add("--seconds", type=float, help="of each (default: 12)")
    add("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)

    def run() -> None:
        options = {name: value for name, value in vars(arguments).items() if name not in ("out", "bundle")}
        bundle = arguments.bundle or default_bundle()
        scores = measure_style_scores(Settings(**options, bundle=bundle, split="validation"))
        write_json(arguments.out, scores, indent=1)
        for style, score in scores.items():
            print(f"{style} {score:.3f}")

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
