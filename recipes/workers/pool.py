"""Work on many things side by side; one that fails or kills its process does not stop the rest.

Workers are processes of this machine or, with an address, actors of a Ray cluster, whose machines share the
disk that is read and written. What comes out is the same, in the same order, by any number of workers.
"""

import argparse
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from duotok.recipes.workers.processes import run_in_processes
from duotok.recipes.workers.ray_pool import run_on_ray
from duotok.tokenizer.common.errors import ConfigError

TaskT = TypeVar("TaskT")


@dataclass(frozen=True, kw_only=True)
class Workers:
    """How many work, and where."""

    count: int = 1
    ray: str | None = (
        None  # address of a cluster, or "auto" for the one here; None: processes of this machine
    )
    gpus: float = 0.0  # that a Ray actor needs, parts of one too

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ConfigError(f"--workers must be at least 1, got {self.count}")
        if self.gpus < 0 or (self.gpus and self.ray is None):
            raise ConfigError("--gpus must not be negative, and belongs to --ray")

    @property
    def are_apart(self) -> bool:
        """Whether work is done outside of this process."""
        return self.count > 1 or self.ray is not None

    def run(
        self,
        tasks: Iterable[TaskT],
        work: Callable[[Any], Any],
        *,
        start: Callable[..., object] | None = None,
        arguments: tuple = (),
    ) -> Generator[tuple[TaskT, Any], None, None]:
        """Yield (task, result of work, or a text that says why there is none), in the order of the tasks.

        start(*arguments) runs first in every worker. A full disk is the one failure that ends the run.
        """
        if self.ray is None:
            return run_in_processes(tasks, work, self.count, start, arguments)
        return run_on_ray(tasks, work, self.count, self.ray, self.gpus, start, arguments)


def add_worker_options(parser: argparse.ArgumentParser, default: int = 1) -> None:
    """Add --workers, --ray and --gpus, which `take_workers` reads."""
    add = parser.add_argument
    text = f"processes, or actors of a Ray cluster (default: {default})"
    add("--workers", type=int, default=default, metavar="N", help=text)
    text = "work on a Ray cluster: its address, or auto for the one that this machine belongs to"
    add("--ray", metavar="ADDRESS", help=text)
    add("--gpus", type=float, default=0.0, metavar="G", help="GPUs of each Ray actor, such as 0.25")


def take_workers(values: dict[str, Any]) -> Workers:
    """Take what `add_worker_options` added out of the values of parsed arguments."""
    return Workers(count=values.pop("workers"), ray=values.pop("ray"), gpus=values.pop("gpus"))


def tell_left_out(reasons: Sequence[str], shown: int = 3) -> str:
    """Return the first of many reasons, and how many more there are."""
    more = f"; and {len(reasons) - shown} more" if len(reasons) > shown else ""
    return "; ".join(reasons[:shown]) + more
