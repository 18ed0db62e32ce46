"""Results as a Markdown table, also between the marks of a README.

Run: python -m duotok.recipes.evaluation.table results.json [--readme README.md]
"""

import argparse
import os
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from duotok.recipes.command import guard
from duotok.recipes.evaluation.table_rows import ROWS
from duotok.tokenizer.common.errors import DataError

BEGIN, END = "<!-- results -->", "<!-- /results -->"
Figures = Mapping[str, float]


def render_table(figures: Figures) -> str:
    """The Markdown table of the figures that are there, one section after the other."""
    lines = ["| measured on the test songs | value | should be |", "|---|---|---|"]
    for section, rows in ROWS.items():
        found = [row for row in rows if all(key in figures for key in row.keys)]
        if found:
            lines.append(f"| **{section}** | | |")
        for row in found:
            lines.append(f"| {row.label} | {row.form(*(figures[key] for key in row.keys))} | {row.should} |")
    return "\n".join(lines)


def put_between_marks(text: str, table: str) -> str:
    """The text with the table between its two marks; raises DataError where they are missing."""
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise DataError(f"there must be one {BEGIN} and after it one {END} in the README")
    pattern = re.escape(BEGIN) + ".*?" + re.escape(END)
    return re.sub(pattern, lambda _: f"{BEGIN}\n{table}\n{END}", text, flags=re.DOTALL)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="Results as a Markdown table.")
    parser.add_argument("results", type=Path, help="results.json of score.py")
    parser.add_argument("--readme", type=Path, help="file whose block between the marks is replaced")
    arguments = parser.parse_args(argv)

    def show() -> None:
        from duotok.recipes.evaluation.results import read_results

        table = render_table(read_results(arguments.results))
        if arguments.readme is not None:
            _update(arguments.readme, table)
        print(table)

    return guard(show)


def _update(readme: Path, table: str) -> None:
    temporary = readme.with_name(f".{readme.name}.{os.getpid()}.part")
    try:
        temporary.write_text(put_between_marks(readme.read_text(encoding="utf-8"), table), encoding="utf-8")
        os.replace(temporary, readme)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise DataError(f"cannot update {readme}: {error.strerror or error}") from error


if __name__ == "__main__":
    sys.exit(main())
