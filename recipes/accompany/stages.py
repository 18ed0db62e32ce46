"""The stages of an accompaniment: how long each takes, and how far it is."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from duotok.tokenizer.common.errors import ConfigError

STAGES = ("listen", "compose", "paint", "sound", "mix")  # the last three for every accompaniment
Progress = Callable[[str, float], None]  # stage, share of it that is done (0 to 1)


class StageClock:
    """Measures the stages and passes their progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside; a stage that comes again replaces its time."""
        self.tell(name, 0.0)
        began = time.perf_counter()
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise ConfigError("the device has too little memory; use --device cpu") from error
        self.seconds[name] = time.perf_counter() - began
        self.tell(name, 1.0)

    def tell(self, name: str, share: float) -> None:
        """Say how much of a stage is done, 0 to 1."""
        if self._progress is not None:
            self._progress(name, min(share, 1.0))

    def counter(self, name: str, total: int) -> Callable[[int], None]:
        """A callback that is given how much was added."""
        done = 0

        def add(amount: int) -> None:
            nonlocal done
            done += amount
            self.tell(name, done / total)

        return add
