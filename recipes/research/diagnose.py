"""Diagnose a tokenizer and its language model on the test songs: pictures and one JSON file (P 6, B.2, E.1).

Run: python -m duotok.recipes.research.diagnose --corpus DIR [--bundle DIR] --out FOLDER
Parts: predictability, corruption, context, codes, probe; --parts chooses some of them. FOLDER gets PART.png
and diagnostics.json (the figures of every part that was ever run into it), and keeps the tokens it makes, so
that the same command goes on where it was stopped.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError
from duotok.tokenizer.common.files import write_json

if TYPE_CHECKING:
    from duotok.recipes.research.diagnosis import Diagnosis, DiagnosisSettings

PARTS = ("predictability", "corruption", "context", "codes", "probe")
RESULTS = "diagnostics.json"
UNREADABLE = "unreadable.json"
_NEEDS_LM = PARTS[:3]


def run_part(part: str, diagnosis: "Diagnosis") -> dict[str, float]:
    """Measure one part, draw it, return its figures named without the part."""
    from duotok.recipes.research import plots

    picture = diagnosis.settings.out / f"{part}.png"
    seed = diagnosis.settings.seed
    if part == "predictability":
        from duotok.recipes.evaluation.lm_part import measure_predictability

        predictability = measure_predictability(diagnosis.lm, diagnosis.windows)
        plots.draw_predictability(predictability, picture)
        return predictability.figures()
    if part == "corruption":
        from duotok.recipes.research.corruption import measure_corruption

        corruption = measure_corruption(diagnosis.lm, diagnosis.windows, seed)
        plots.draw_corruption(corruption, picture)
        return corruption.figures()
    if part == "context":
        from duotok.recipes.evaluation.lm_part import measure_context

        context = measure_context(diagnosis.lm, diagnosis.windows)
        plots.draw_context(context, picture)
        return context.figures()
    if part == "codes":
        from duotok.recipes.research.code_usage import count_usage

        sizes = {track: len(vectors) for track, vectors in diagnosis.vectors.items()}
        usage = count_usage(diagnosis.test_codes().values(), sizes)
        plots.draw_codes(usage, picture)
        return {name: value for track in usage.values() for name, value in track.figures().items()}

    from duotok.recipes.research.probe import measure_probe

    probe = measure_probe(diagnosis)
    plots.draw_probe(probe, picture)
    return probe.figures()


def run_parts(parts: Sequence[str], settings: "DiagnosisSettings") -> dict[str, str]:
    """Run parts one after the other, keep the figures of each as soon as it is done; return what failed."""
    from duotok.recipes.evaluation.results import merge_results
    from duotok.recipes.research.diagnosis import Diagnosis

    diagnosis = Diagnosis(settings)
    failed: dict[str, str] = {}
    for part in parts:
        start = time.monotonic()
        try:
            figures = run_part(part, diagnosis)
            figures["seconds"] = time.monotonic() - start
            merge_results(settings.out / RESULTS, part, figures)
        except DuoTokError as error:
            failed[part] = str(error)
            print(f"error: {part}: {error}", file=sys.stderr)
            continue
        print(f"{part}: {figures['seconds']:.0f} s -> {settings.out / part}.png, {settings.out / RESULTS}")
    if diagnosis.unreadable:
        path = settings.out / UNREADABLE
        write_json(path, diagnosis.unreadable)
        print(f"{len(diagnosis.unreadable)} items cannot be read and were left out -> {path}")
    return failed


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.research.diagnose", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("--corpus", type=Path, required=True, help="folder with test.jsonl and train.jsonl")
    parser.add_argument("--bundle", type=Path, help="model bundle (default: the one in the package)")
    parser.add_argument("--tokenizer", type=Path, help="tokenizer folder in place of the bundle's")
    parser.add_argument("--lm", type=Path, help="language model folder in place of the bundle's")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures and figures")
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all that can be run")
    parser.add_argument("--items", type=int, default=48, help="test items and windows (default: 48)")
    parser.add_argument("--seconds", type=float, default=30.0, help="of each window (default: 30)")
    parser.add_argument("--tokens", type=Path, help="token shards of train.jsonl (default: made here)")
    parser.add_argument("--train-items", type=int, help="items the probe learns from (default: all)")
    parser.add_argument("--epochs", type=int, default=10, help="of the Conformer probe (default: 10)")
    parser.add_argument(
        "--no-mel", action="store_true", help="probe: leave out the anchor that needs the sound"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args(argv)
    has_lm = arguments.lm is not None or arguments.tokenizer is None
    parts = [part for part in PARTS if part in (arguments.parts or PARTS)]
    if not has_lm and arguments.parts and set(parts) & set(_NEEDS_LM):
        parser.error(f"{', '.join(_NEEDS_LM)} need --lm beside --tokenizer")
    parts = [part for part in parts if has_lm or part not in _NEEDS_LM]
    failed = False

    def run() -> None:
        nonlocal failed
        from duotok.recipes.accompany.bundle import default_bundle
        from duotok.recipes.research.diagnosis import DiagnosisSettings

        bundle = arguments.bundle or default_bundle()
        settings = DiagnosisSettings(
            corpus=arguments.corpus,
            tokenizer=arguments.tokenizer or bundle / "tokenizer",
            lm=arguments.lm or (bundle / "lm" if has_lm else None),
            out=arguments.out,
            items=arguments.items,
            seconds=arguments.seconds,
            train_items=arguments.train_items,
            tokens=arguments.tokens,
            epochs=arguments.epochs,
            mel=not arguments.no_mel,
            device=arguments.device,
            seed=arguments.seed,
        )
        failed = bool(run_parts(parts, settings))

    code = guard(run, interrupted="finished parts are kept; run the same command again to go on")
    return code or int(failed)


if __name__ == "__main__":
    sys.exit(main())
