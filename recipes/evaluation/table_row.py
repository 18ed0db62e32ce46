"""One line of the results table, and the forms in which figures are shown."""

from collections.abc import Callable
from typing import NamedTuple


class Row(NamedTuple):
    """One line of the table."""

    label: str
    keys: tuple[str, ...]  # the figures it needs; a row without them is left out
    form: Callable[..., str]  # of the figures' values
    should: str  # what the figure should be


def plain(digits: int, unit: str = "") -> Callable[..., str]:
    """Return the form that shows all values with so many digits, and their unit."""
    return lambda *values: " / ".join(f"{value:.{digits}f}{unit}" for value in values)


def difference(value: float, other: float) -> str:
    """Return how far the first value is above the second, and both."""
    return f"{value - other:+.2f} ({value:.2f} against {other:.2f})"
