"""What is known about the quality of the sound after it was measured."""

from collections.abc import Mapping
from dataclasses import dataclass

from duotok.recipes.evaluation.frechet import Anchors


@dataclass(frozen=True, kw_only=True)
class Value:
    """A measure over the excerpts."""

    mean: float
    margin: float  # half the width of its 95 % interval; NaN where it is a single number
    count: int


@dataclass(frozen=True, kw_only=True)
class Quality:
    """Everything that was measured."""

    values: Mapping[str, Mapping[str, Mapping[str, Value]]]  # track -> sound -> measure
    anchors: Anchors | None
    excerpts: int
    seconds: float
    left_out: tuple[str, ...]  # what could not be measured, and why

    def figures(self) -> dict[str, float]:
        """Flat figures; those of the original itself are left out."""
        found: dict[str, float] = {"excerpts": self.excerpts, "excerpt_seconds": self.seconds}
        if self.anchors is not None:
            found |= self.anchors.figures()
        for track, sounds in self.values.items():
            for sound, measures in sounds.items():
                if sound != "original":
                    found |= {f"{track}_{sound}_{name}": value.mean for name, value in measures.items()}
        return found
