"""Time spent on a run, earlier pieces included."""

import time


class Clock:
    """Counts on from the seconds of earlier pieces, against a budget of minutes if there is one."""

    def __init__(self, before_seconds: float, minutes: float | None) -> None:
        self._start = time.monotonic() - before_seconds
        self._budget_seconds = None if minutes is None else minutes * 60
        self._last_checkpoint = time.monotonic()

    def elapsed(self) -> float:
        """Return the seconds of the whole run."""
        return time.monotonic() - self._start

    def is_over(self) -> bool:
        """Say whether the budget is spent."""
        return self._budget_seconds is not None and self.elapsed() >= self._budget_seconds

    def progress(self, step: int, steps: int) -> float:
        """Return how much of the run is done, 0 to 1: of the budget, or of the steps where there is none."""
        return step / steps if self._budget_seconds is None else self.elapsed() / self._budget_seconds

    def checkpoint_due(self, minutes: float) -> bool:
        """Say whether the last checkpoint is that old, and count from now if so."""
        if time.monotonic() - self._last_checkpoint < minutes * 60:
            return False
        self._last_checkpoint = time.monotonic()
        return True
