"""A page that plans a large corpus from what one and two workers did: node hours, storage, cost.

Run: python -m duotok.recipes.workers.node_hours --measured tokenize=60,115 --storage tokenize=0.0007 \\
         --hours 10000 --workers-per-node 16 --nodes 8 --cost-per-node-hour 1.5 --out plan.md
--measured takes hours of audio per hour of one worker, and of two on the same machine. What two gain less
than double is taken for the share of the work that workers of a machine do one after the other (Amdahl);
machines are taken to add up.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_text


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What was measured of one stage of the work."""

    name: str
    one: float  # hours of audio per hour, by one worker
    two: float
    storage_gb: float = 0.0  # of an hour of audio

    def __post_init__(self) -> None:
        if not 0 < self.one <= self.two <= 2.5 * self.one:
            raise ConfigError(
                f"--measured {self.name}={self.one:g},{self.two:g}: two workers must do as much as one and "
                "not far above double; measure them on the same idle machine"
            )

    @property
    def serial_share(self) -> float:
        """Share of the work that the workers of a machine do one after the other."""
        return max(0.0, 2 * self.one / self.two - 1)

    def node_rate(self, workers: int) -> float:
        """Hours of audio per hour of a machine with so many workers."""
        return self.one * workers / (1 + self.serial_share * (workers - 1))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is to be done, and on what."""

    hours: float  # of audio
    nodes: int
    workers_per_node: int
    cost_per_node_hour: float
    cost_per_tb_month: float

    def __post_init__(self) -> None:
        for name in ("hours", "nodes", "workers_per_node"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {getattr(self, name)}")
        for name in ("cost_per_node_hour", "cost_per_tb_month"):
            if not getattr(self, name) >= 0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} must not be negative, got {getattr(self, name)}"
                )


def write_plan(plan: Plan, stages: Sequence[Stage]) -> str:
    """Return the page in Markdown."""
    lines = [
        f"# {plan.hours:,.0f} hours of audio on {plan.nodes} machines of {plan.workers_per_node} workers", "",
        "| stage | one worker | two | in turn | a machine | machine hours | hours | cost | storage |",
        "|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    total_node_hours = total_tb = 0.0
    for stage in stages:
        rate = stage.node_rate(plan.workers_per_node)
        node_hours, terabytes = plan.hours / rate, plan.hours * stage.storage_gb / 1000
        total_node_hours, total_tb = total_node_hours + node_hours, total_tb + terabytes
        lines.append(
            f"| {stage.name} | {stage.one:,.4g} x | {stage.two:,.4g} x | {stage.serial_share:.1%} | "
            f"{rate:,.4g} x | {_cells(plan, node_hours, terabytes)} |"
        )
    lines += [f"| **all** | | | | | {_cells(plan, total_node_hours, total_tb)} |", ""]
    month = total_tb * plan.cost_per_tb_month
    lines += [
        "x: hours of audio per hour; in turn: share of the work that workers of a machine do one after the "
        f"other. Cost: {plan.cost_per_node_hour:g} per machine and hour; what is stored costs {month:,.2f} a "
        f"month at {plan.cost_per_tb_month:g} per TB. Machines are taken to add up, their disk to keep up.",
    ]
    return "\n".join(lines) + "\n"


def _cells(plan: Plan, node_hours: float, terabytes: float) -> str:
    cost = node_hours * plan.cost_per_node_hour
    return f"{node_hours:,.1f} | {node_hours / plan.nodes:,.1f} | {cost:,.2f} | {terabytes:,.3f} TB"


def _numbers(option: str, texts: Sequence[str], count: int) -> dict[str, list[float]]:
    """{name: numbers} of texts like NAME=1,2."""
    found = {}
    for text in texts:
        name, _, values = text.partition("=")
        try:
            found[name] = [float(value) for value in values.split(",")]
        except ValueError:
            found[name] = []
        if not name or len(found[name]) != count:
            raise ConfigError(f"{option} takes NAME={','.join('AB'[:count])} with numbers, got {text!r}")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Plan a large corpus from what one and two workers did.")
    option = parser.add_argument
    text = "hours of audio per hour, by one worker and by two; again for every stage"
    option("--measured", action="append", required=True, metavar="STAGE=ONE,TWO", help=text)
    text = "GB that an hour of audio leaves on the disk (default: 0)"
    option("--storage", action="append", default=[], metavar="STAGE=GB", help=text)
    option("--hours", type=float, default=10_000, help="of audio (default: 10000)")
    option("--nodes", type=int, default=1, help="machines")
    option("--workers-per-node", type=int, default=1)
    option("--cost-per-node-hour", type=float, default=0.0, help="in any currency")
    option("--cost-per-tb-month", type=float, default=0.0)
    option("--out", type=Path, help="file of the page (default: standard output)")
    arguments = parser.parse_args(argv)
    return guard(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    measured = _numbers("--measured", arguments.measured, 2)
    storage = _numbers("--storage", arguments.storage, 1)
    for name in storage:
        if name not in measured:
            raise ConfigError(f"--storage {name}: no such stage; --measured names {', '.join(measured)}")
    stages = [
        Stage(name=name, one=one, two=two, storage_gb=storage.get(name, [0.0])[0])
        for name, (one, two) in measured.items()
    ]
    names = ("hours", "nodes", "workers_per_node", "cost_per_node_hour", "cost_per_tb_month")
    page = write_plan(Plan(**{name: getattr(arguments, name) for name in names}), stages)
    if arguments.out is None:
        print(page, end="")
    else:
        write_text(arguments.out, page)


if __name__ == "__main__":
    sys.exit(main())
