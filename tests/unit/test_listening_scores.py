"""Ratings files are checked row by row; means and intervals are those of the textbook."""

import json
import math
import sys
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
from scipy.stats import t as student_t

from duotok.recipes.evaluation.results import mean_and_margin
from duotok.recipes.listening import listen
from duotok.recipes.listening.page import COLUMNS, Key
from duotok.recipes.listening.scores import Rating, read_ratings, score_systems, write_report
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_json

CLIPS, SYSTEMS = ("x", "y", "z"), ("original", "tokens")
KEY = Key(
    page="abc",
    loudness_lufs=-23.0,
    stimuli={f"S{n:03d}": pair for n, pair in enumerate(product(SYSTEMS, CLIPS), start=1)},
)


@pytest.fixture
def key_file(tmp_path):
    write_json(tmp_path / "key.json", {"format": 1, **asdict(KEY)})
    return str(tmp_path / "key.json")


def write_ratings(path, rater="ann", grades=None, **changes):
    """A ratings file with one row per stimulus; grades by stimulus, changes to the first row's columns."""
    rows = []
    for position, name in enumerate(KEY.stimuli, start=1):
        grade = (grades or {}).get(name, 5 if KEY.stimuli[name][0] == "original" else 2)
        if grade is not None:
            rows.append(dict(zip(COLUMNS, ("abc", rater, position, name, grade, 1), strict=True)))
    rows[0] |= changes
    lines = [",".join(COLUMNS), *(",".join(str(row[name]) for name in COLUMNS) for row in rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def rate(rater: str, system: str, clip: str, grade: int) -> Rating:
    return Rating(rater=rater, stimulus=f"{system}{clip}", system=system, clip=clip, grade=grade)


def test_the_margin_is_student_s():
    mean, margin = mean_and_margin([1, 2, 3, 4, 5])
    assert mean == 3
    assert margin == pytest.approx(student_t.ppf(0.975, 4) * np.std([1, 2, 3, 4, 5], ddof=1) / math.sqrt(5))
    assert margin == pytest.approx(1.963, abs=1e-3)
    assert mean_and_margin([4])[0] == 4 and math.isnan(mean_and_margin([4])[1])


def test_means_counts_and_order():
    ratings = [rate("a", "bad", "x", 2), rate("b", "bad", "x", 3), rate("a", "good", "x", 4)]
    best, worst = score_systems(ratings)
    assert (best.system, best.mean, best.ratings, best.raters) == ("good", 4, 1, 1)
    assert math.isnan(best.margin) and (best.low, best.high) == (4, 4)
    assert (worst.system, worst.mean, worst.counts) == ("bad", 2.5, (0, 1, 1, 0, 0))


def test_intervals_cover_the_truth_and_know_that_ratings_of_one_listener_go_together():
    # Every listener has a leaning, every clip a quality; the truth is 3.
    rng = np.random.default_rng(0)
    naive = honest = 0
    trials = 100
    for trial in range(trials):
        leanings, clips = rng.choice([-1, 0, 1], 6), rng.choice([-1, 0, 1], 6)
        pairs = product(range(6), range(6))
        ratings = [rate(str(r), "s", str(c), int(3 + leanings[r] + clips[c])) for r, c in pairs]
        found = score_systems(ratings, seed=trial)[0]
        naive += abs(found.mean - 3) <= found.margin
        honest += found.low <= 3 <= found.high
    assert honest / trials > 0.85
    assert naive / trials < honest / trials - 0.1  # taking all ratings for independent is too sure


def test_files_of_several_listeners_become_one_table(key_file, tmp_path, capsys):
    files = [str(write_ratings(tmp_path / f"{rater}.csv", rater)) for rater in ("ann", "bob")]
    files.append(str(write_ratings(tmp_path / "cy.csv", "cy", {"S001": 4, "S006": None})))
    options = ["score", *files, "--key", key_file, "--out", str(tmp_path / "out" / "mos")]
    assert listen.main(options) == 0
    told = capsys.readouterr()
    assert told.err == "warning: cy left 1 of 6 clips unrated\n"
    assert "| original | 4.89 | ± 0.26 |" in told.out and "| tokens | 2.00 |" in told.out
    found = json.loads((tmp_path / "out" / "mos" / "mos.json").read_text())
    assert found["page"] == "abc" and found["systems"]["tokens"]["counts"] == [0, 8, 0, 0, 0]
    assert (tmp_path / "out" / "mos" / "mos.md").read_text() == told.out
    assert (tmp_path / "out" / "mos" / "mos.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"page": "xyz"}, "row 2: it rates the page xyz, the key is that of abc"),
        ({"rating": "6"}, "row 2: a rating must be 1 to 5, got '6'"),
        ({"rating": "3.5"}, "got '3.5'"),
        ({"stimulus": "S999"}, "row 2: the page has no stimulus 'S999'"),
        ({"stimulus": "S002"}, "row 3: ann has rated S002 before"),
        ({"plays": "1,1"}, "row 2: expected 6 values, got 7"),
    ],
)
def test_bad_rows_are_named(tmp_path, changes, message):
    with pytest.raises(DataError) as error:
        read_ratings([write_ratings(tmp_path / "r.csv", **changes)], KEY)
    assert message in str(error.value) and "r.csv" in str(error.value)


def test_a_missing_system_and_the_same_file_twice_are_told(tmp_path):
    path = write_ratings(tmp_path / "r.csv")
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))  # as a spreadsheet saves it
    assert len(read_ratings([path], KEY)) == 6
    with pytest.raises(DataError, match="give each listener's ratings once"):
        read_ratings([path, path], KEY)
    grades = {name: None for name, (system, _) in KEY.stimuli.items() if system == "tokens"}
    with pytest.raises(DataError, match="nobody rated tokens"):
        read_ratings([write_ratings(path, grades=grades)], KEY)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"a,b\n1,2\n", "is no ratings file"),
        (b"", "no ratings"),
        (",".join(COLUMNS).encode(), "there are no ratings"),
    ],
)
def test_a_file_that_is_none_is_one_line(key_file, tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "r.csv").write_bytes(content)
    options = [str(tmp_path / "r.csv"), "--key", key_file, "--out", str(tmp_path / "mos")]
    assert listen.main(["score", *options]) == 1
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not (tmp_path / "mos").exists()


def test_without_matplotlib_there_is_a_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write_report(score_systems([rate("a", "good", "x", 4)]), tmp_path, "abc")
    assert capsys.readouterr().err == "warning: no mos.png without matplotlib; pip install matplotlib\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mos.json", "mos.md"]
