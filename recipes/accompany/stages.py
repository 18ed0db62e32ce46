"""The stages of an accompaniment: how long each takes, how far it is, and how far all of them are."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from duotok.tokenizer.common.errors import ConfigError

STAGES = ("listen", "compose", "paint", "sound", "mix")  # the last three for every accompaniment
Progress = Callable[[str, float], None]  # stage, share of it that is done (0 to 1)
# Share of the computing time of each stage.
_TOGETHER = {"listen": 5, "compose": 45}  # once for all variations
_EACH = {"paint": 30, "sound": 15, "mix": 5}
STAGE_NAMES = {
    "listen": "listening",
    "compose": "composing",
    "paint": "playing",
    "sound": "sounding",
    "mix": "mixing",
}


class StageClock:
    """Measures the stages and passes their progress on."""

    def __init__(self, progress: Progress | None) -> None:
        self.seconds: dict[str, float] = {}
        self._progress = progress

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what happens inside; a stage that comes again replaces its time."""
        import torch  # not needed to count shares, as --help and the service's client do

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


class WholeProgress:
    """Makes one share of all the work out of shares of stages."""

    def __init__(self, renderings: int) -> None:
        self._once, self._each = sum(_TOGETHER.values()), sum(_EACH.values())
        self._total = self._once + self._each * renderings
        self._finished, self._stage = 0, ""

    def tell(self, stage: str, share: float) -> float:
        """Return the share of all (0 to 1) where a stage is at a share of its own.

        The last stages come again for every accompaniment.
        """
        stages, place = (_TOGETHER, 0) if stage in _TOGETHER else (_EACH, self._once)
        names = list(stages)
        self._finished += (self._stage, stage) == (list(_EACH)[-1], list(_EACH)[0])
        self._stage = stage
        place += sum(stages[name] for name in names[: names.index(stage)])
        return (place + self._each * self._finished + share * stages[stage]) / self._total
