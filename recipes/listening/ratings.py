"""Ratings files that listeners sent back, checked row by row against the key of their page."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duotok.recipes.listening.page import COLUMNS, SCALE, Key
from duotok.tokenizer.common.errors import DataError

GRADES = tuple(sorted(grade for grade, _, _ in SCALE))


@dataclass(frozen=True, kw_only=True)
class Rating:
    """One listener's grade of one stimulus."""

    rater: str
    stimulus: str
    system: str
    clip: str
    grade: int  # 1 to 5


def read_ratings(paths: Sequence[Path], key: Key) -> list[Rating]:
    """All ratings of the files.

    Raises DataError, naming file and row, for another page's ratings, an unknown stimulus, a grade that is
    none, or a listener who rated a stimulus twice; and where a system was not rated at all.
    """
    ratings: list[Rating] = []
    seen: dict[tuple[str, str], Path] = {}
    for path in paths:
        for number, row in _read_rows(path):
            rating = _check_row(row, key, f"{path}, row {number}")
            known = (rating.rater, rating.stimulus)
            if known in seen:
                raise DataError(
                    f"{path}, row {number}: {rating.rater} has rated {rating.stimulus} before, in "
                    f"{seen[known]}; give each listener's ratings once"
                )
            seen[known] = path
            ratings.append(rating)
    if not ratings:
        raise DataError(f"{', '.join(map(str, paths))}: there are no ratings")
    rated = {rating.system for rating in ratings}
    missing = [system for system in key.systems if system not in rated]
    if missing:
        raise DataError(f"nobody rated {', '.join(missing)}; ratings are needed of {', '.join(key.systems)}")
    return ratings


def find_incomplete(ratings: Sequence[Rating], key: Key) -> dict[str, int]:
    """{listener: stimuli not rated} of those who did not rate them all."""
    counts: dict[str, int] = {}
    for rating in ratings:
        counts[rating.rater] = counts.get(rating.rater, 0) + 1
    return {rater: len(key.stimuli) - count for rater, count in counts.items() if count < len(key.stimuli)}


def _read_rows(path: Path) -> list[tuple[int, dict[str, str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = [row for row in csv.reader(file) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot read {path}: {error}; give the CSV that the page saved") from error
    if not rows or tuple(rows[0]) != COLUMNS:
        raise DataError(f"{path} is no ratings file: its first row must be {','.join(COLUMNS)}")
    found = []
    for number, row in enumerate(rows[1:], start=2):
        if len(row) != len(COLUMNS):
            raise DataError(f"{path}, row {number}: expected {len(COLUMNS)} values, got {len(row)}")
        found.append((number, dict(zip(COLUMNS, row, strict=True))))
    return found


def _check_row(row: dict[str, str], key: Key, where: str) -> Rating:
    if row["page"] != key.page:
        raise DataError(f"{where}: it rates the page {row['page']}, the key is that of {key.page}")
    if row["stimulus"] not in key.stimuli:
        raise DataError(f"{where}: the page has no stimulus {row['stimulus']!r}")
    if row["rating"] not in map(str, GRADES):
        raise DataError(f"{where}: a rating must be {GRADES[0]} to {GRADES[-1]}, got {row['rating']!r}")
    system, clip = key.stimuli[row["stimulus"]]
    return Rating(
        rater=row["rater"], stimulus=row["stimulus"], system=system, clip=clip, grade=int(row["rating"])
    )
