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
_NEEDS_LM = PARTS[:3]


def run_part(part: str, diagnosis: "Diagnosis") -> dict[str, float]:
    """Measure one part, draw it, return its figures named without the part."""
    from duotok.recipes.evaluation import lm_part
    from duotok.recipes.research import diagnosis as measures
    from duotok.recipes.research import plots, probe

    settings = diagnosis.settings
    picture = settings.out / f"{part}.png"
    if part == "probe":
        figures = probe.measure_probe(diagnosis)
        plots.draw_probe(figures, picture)
    elif part == "codes":
        sizes = {track: len(vectors) for track, vectors in diagnosis.vectors.items()}
        items = diagnosis.codes_of(diagnosis.test_items, "test").values()
        counts = measures.count_codes(list(items), sizes)
        figures = measures.describe_usage(counts)
        plots.draw_codes(figures, counts, picture)
    else:
        lm, windows = diagnosis.lm, diagnosis.windows
        if part == "predictability":
            figures = lm_part.measure_predictability(lm, windows)
        elif part == "corruption":
            damages = measures.SHIFTS_SECONDS, measures.MASK_SHARES
            figures = lm_part.measure_costs(lm, windows, *damages, settings.seed)
        else:
            figures = lm_part.measure_context(lm, windows)
        figures |= windows.size
        draw = {
            "predictability": plots.draw_predictability,
            "corruption": plots.draw_corruption,
            "context": plots.draw_context,
        }[part]
        draw(figures, picture)
    return figures


def run_parts(parts: Sequence[str], settings: "DiagnosisSettings") -> bool:
    """Run parts one after the other, keep the figures of each at once; tell whether all went well."""
    from duotok.recipes.evaluation.results import merge_results
    from duotok.recipes.research.diagnosis import Diagnosis

    diagnosis, went_well, results = Diagnosis(settings), True, settings.out / "diagnostics.json"
    for part in parts:
        start = time.monotonic()
        try:
            figures = run_part(part, diagnosis)
            figures["seconds"] = time.monotonic() - start
            merge_results(results, part, figures)
        except DuoTokError as error:
            went_well = False
            print(f"error: {part}: {error}", file=sys.stderr)
            continue
        print(f"{part}: {figures['seconds']:.0f} s -> {settings.out / part}.png, {results}")
    if diagnosis.unreadable:
        path = settings.out / "unreadable.json"
        write_json(path, diagnosis.unreadable)
        print(f"{len(diagnosis.unreadable)} items cannot be read and were left out -> {path}")
    return went_well


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.research.diagnose", description=(__doc__ or "").splitlines()[0]
    )
    add = parser.add_argument
    add("--corpus", type=Path, required=True, help="folder with test.jsonl and train.jsonl")
    add("--bundle", type=Path, help="model bundle (default: the one in the package)")
    add("--tokenizer", type=Path, help="tokenizer folder in place of the bundle's")
    add("--lm", type=Path, help="language model folder in place of the bundle's")
    add("--out", type=Path, required=True, help="folder of the pictures and figures")
    add("--parts", nargs="+", choices=PARTS, help="default: all that can be run")
    add("--items", type=int, default=48, help="test items and windows (default: 48)")
    add("--seconds", type=float, default=30.0, help="of each window (default: 30)")
    add("--train-items", type=int, help="items the probe learns from (default: all)")
    add("--epochs", type=int, default=10, help="of the Conformer probe (default: 10)")
    add("--no-mel", dest="mel", action="store_false", help="probe without the anchor that needs the sound")
    add("--device", default="cpu", help="cpu, cuda or mps")
    add("--seed", type=int, default=0)
    chosen = vars(parser.parse_args(argv))
    bundle, wanted = chosen.pop("bundle"), chosen.pop("parts")
    has_lm = chosen["lm"] is not None or chosen["tokenizer"] is None
    if not has_lm and wanted and set(wanted) & set(_NEEDS_LM):
        parser.error(f"{', '.join(_NEEDS_LM)} need --lm beside --tokenizer")
    parts = [part for part in PARTS if part in (wanted or PARTS) and (has_lm or part not in _NEEDS_LM)]
    went_well = True

    def run() -> None:
        nonlocal went_well
        from duotok.recipes.accompany.bundle import default_bundle
        from duotok.recipes.research.diagnosis import DiagnosisSettings

        folder = bundle or default_bundle()
        chosen["lm"] = chosen["lm"] or (folder / "lm" if has_lm else None)
        chosen["tokenizer"] = chosen["tokenizer"] or folder / "tokenizer"
        went_well = run_parts(parts, DiagnosisSettings(**chosen))

    code = guard(run, interrupted="finished parts are kept; run the same command again to go on")
    return code or int(not went_well)


if __name__ == "__main__":
    sys.exit(main())
