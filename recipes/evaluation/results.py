"""The results file: one flat JSON object of named figures, one prefix per part; means with 95 % intervals."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from scipy.stats import t as student_t

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_json

Figures = dict[str, float]
CONFIDENCE = 0.95


def read_results(path: str | Path) -> Figures:
    """The figures of a results file; raises DataError when it is missing or no such file."""
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"cannot read the results {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is not JSON: {error}; remove it and measure again") from error
    if not isinstance(values, dict) or not all(isinstance(value, (int, float)) for value in values.values()):
        raise DataError(f"{path} must hold one object of named numbers; remove it and measure again")
    return values


def merge_results(path: str | Path, part: str, figures: Mapping[str, float]) -> Figures:
    """Replace all figures of one part ("generate.…") in the file and keep those of the others.

    figures: names without the part, finite values. The file appears under its name only when it is whole.
    """
    path = Path(path)
    merged = read_results(path) if path.exists() else {}
    merged = {name: value for name, value in merged.items() if not name.startswith(f"{part}.")}
    for name, value in figures.items():
        if not math.isfinite(value):
            raise DataError(f"{part}.{name} is {value}; a figure must be a finite number")
        merged[f"{part}.{name}"] = value if isinstance(value, int) else round(float(value), 5)
    merged = dict(sorted(merged.items()))
    write_json(path, merged)
    return merged


def mean_and_margin(values: Sequence[float]) -> tuple[float, float]:
    """The mean, and half the width of its 95 % interval by Student's t; NaN for fewer than two values.

    The values count as independent.
    """
    found = np.asarray(values, dtype=float)
    if len(found) < 2:
        return (float(found.mean()) if len(found) else math.nan), math.nan
    error = found.std(ddof=1) / math.sqrt(len(found))
    return float(found.mean()), float(student_t.ppf((1 + CONFIDENCE) / 2, len(found) - 1) * error)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean; 0 for a single value."""
    return float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else 0.0
