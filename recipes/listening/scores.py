"""Mean opinion scores of the ratings that came back, with 95 % intervals (P B.4): table, JSON and picture."""

import csv
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from duotok.recipes.evaluation.results import CONFIDENCE, mean_and_margin
from duotok.recipes.listening.page import COLUMNS, SCALE, Key
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import whole_file, write_json, write_text

GRADES = tuple(sorted(grade for grade, _, _ in SCALE))
_DRAWS = 4000  # of the bootstrap


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
    name, grade = row["stimulus"], int(row["rating"])
    system, clip = key.stimuli[name]
    return Rating(rater=row["rater"], stimulus=name, system=system, clip=clip, grade=grade)


@dataclass(frozen=True, kw_only=True)
class Opinion:
    """What listeners think of one system."""

    system: str
    mean: float  # 1 to 5
    margin: float  # half the 95 % interval by Student's t over all ratings, as papers report; NaN for one
    low: float  # 95 % interval with listeners and clips drawn anew, which is the honest one: ratings of one
    high: float  # listener, or of one clip, are not independent
    counts: tuple[int, ...]  # ratings by grade, 1 first
    raters: int
    clips: int

    @property
    def ratings(self) -> int:
        """Number of ratings."""
        return sum(self.counts)


def score_systems(ratings: Sequence[Rating], *, seed: int = 0) -> list[Opinion]:
    """The opinions of all rated systems, best first."""
    opinions = []
    for system in sorted({rating.system for rating in ratings}):
        own = [rating for rating in ratings if rating.system == system]
        grades = [rating.grade for rating in own]
        mean, margin = mean_and_margin(grades)
        low, high = _bootstrap(own, seed)
        counts = tuple(grades.count(grade) for grade in GRADES)
        raters, clips = len({rating.rater for rating in own}), len({rating.clip for rating in own})
        values = {"mean": mean, "margin": margin, "low": low, "high": high}
        opinions.append(Opinion(system=system, **values, counts=counts, raters=raters, clips=clips))
    return sorted(opinions, key=lambda opinion: -opinion.mean)


def _bootstrap(ratings: Sequence[Rating], seed: int) -> tuple[float, float]:
    """Percentiles of the mean when listeners and clips are drawn with replacement, each on their own."""
    raters = sorted({rating.rater for rating in ratings})
    clips = sorted({rating.clip for rating in ratings})
    grades, rated = np.zeros((len(raters), len(clips))), np.zeros((len(raters), len(clips)))
    for rating in ratings:
        place = raters.index(rating.rater), clips.index(rating.clip)
        grades[place] += rating.grade
        rated[place] += 1
    rng = np.random.default_rng(seed)
    rater_counts, clip_counts = (
        rng.multinomial(count, np.full(count, 1 / count), size=_DRAWS) for count in grades.shape
    )
    totals = np.einsum("dr,rc,dc->d", rater_counts, grades, clip_counts)
    weights = np.einsum("dr,rc,dc->d", rater_counts, rated, clip_counts)
    means = totals[weights > 0] / weights[weights > 0]
    tail = 100 * (1 - CONFIDENCE) / 2
    low, high = np.percentile(means, [tail, 100 - tail])
    return float(low), float(high)


def write_report(opinions: Sequence[Opinion], folder: Path, page: str) -> None:
    """Write mos.md, mos.json and, where matplotlib is installed, mos.png."""
    systems = {}
    for opinion in opinions:
        values = asdict(opinion)
        values["margin"] = None if math.isnan(opinion.margin) else opinion.margin
        systems[values.pop("system")] = values
    write_json(folder / "mos.json", {"page": page, "systems": systems})
    write_text(folder / "mos.md", render_table(opinions))
    try:
        draw_opinions(opinions, folder / "mos.png")
    except ModuleNotFoundError:
        print("warning: no mos.png without matplotlib; pip install matplotlib", file=sys.stderr)


def render_table(opinions: Sequence[Opinion]) -> str:
    """The Markdown table, best system first."""
    heads = "system | MOS | 95 %, over ratings | 95 %, listeners and clips drawn anew | ratings"
    lines = [f"| {heads} | listeners | clips |", "|---|---:|---:|---:|---:|---:|---:|"]
    for found in opinions:
        margin = "-" if math.isnan(found.margin) else f"± {found.margin:.2f}"
        lines.append(
            f"| {found.system} | {found.mean:.2f} | {margin} | {found.low:.2f} to {found.high:.2f} "
            f"| {found.ratings} | {found.raters} | {found.clips} |"
        )
    return "\n".join(lines) + "\n"


def draw_opinions(opinions: Sequence[Opinion], path: Path) -> None:
    """Write a picture of the means with both intervals, and of how often each grade was given."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 1.9 + 0.5 * len(opinions)), layout="constrained")
    means, grades = figure.subplots(1, 2, sharey=True)
    places = np.arange(len(opinions))
    wide: dict[str, Any] = {"color": "#7fb3c8", "linewidth": 8, "solid_capstyle": "butt"}
    narrow: dict[str, Any] = {"color": "#1f6f8b", "marker": "o", "capsize": 4}
    for place, found in zip(places, opinions, strict=True):
        means.plot([found.low, found.high], [place, place], **wide)
        margin = None if math.isnan(found.margin) else found.margin
        means.errorbar(found.mean, place, xerr=margin, **narrow)
        at = (found.mean, place)
        means.annotate(f"{found.mean:.2f}", at, (0, 9), textcoords="offset points", ha="center")
    means.plot([], [], label="95 %, listeners and clips drawn anew", **wide)
    means.errorbar([], [], xerr=[], label="mean, 95 % over ratings", **narrow)
    means.set_xlim(0.9, 5.1)
    means.set_xticks([grade for grade, _, _ in SCALE], [f"{grade}\n{name}" for grade, name, _ in SCALE])
    means.set_yticks(places, [found.system for found in opinions])
    means.set_ylim(len(opinions) - 0.4, -0.6)
    means.set_title("Mean opinion score")
    shares = np.array([np.array(found.counts) / found.ratings for found in opinions])
    left = np.zeros(len(opinions))
    for column, (grade, name, _) in enumerate(sorted(SCALE)):
        color = colormaps["RdYlGn"](column / (len(SCALE) - 1))
        grades.barh(places, 100 * shares[:, column], 0.6, left=left, color=color, label=f"{grade} {name}")
        left += 100 * shares[:, column]
    grades.set_xlim(0, 100)
    grades.set_xlabel("ratings (%)")
    grades.set_title("Grades given")
    for axes in (means, grades):
        axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
