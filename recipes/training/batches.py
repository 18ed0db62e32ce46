"""The micro-batches of a run, each a pure function of (seed, step, process, micro-batch)."""

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from duotok.recipes.training.loop import Task, TrainConfig


class BatchKey(NamedTuple):
    """What a micro-batch and the random numbers of its pass are drawn from."""

    seed: int
    step: int  # optimizer steps taken before
    process: int
    micro: int  # 0 to train.accumulate - 1

    def generator(self) -> np.random.Generator:
        """Return the generator that the batch is drawn with."""
        # NumPy pads short keys with zeros: micro-batch 0 is that of runs that knew no others.
        return np.random.default_rng(tuple(self))

    def torch_seed(self) -> int:
        """Return the seed of dropout, noise and masks during the pass."""
        return int(np.random.SeedSequence(tuple(self)).generate_state(1)[0])


@dataclass(frozen=True)
class MicroBatch:
    """The objective's arguments, and how much is in them."""

    key: BatchKey
    tensors: dict[str, Tensor]
    units: int  # tokens, frames or samples, as the task counts
    flops: float  # of its forward and backward pass

    def to(self, device: torch.device) -> dict[str, Tensor]:
        """Return the tensors on a device."""
        return {name: tensor.to(device) for name, tensor in self.tensors.items()}


class MicroBatches:
    """Draws the next micro-batches of this process in a thread while the current one computes."""

    DEPTH = 2

    def __init__(self, task: "Task", config: "TrainConfig", *, process: int, first_step: int) -> None:
        self._task, self._accumulate = task, config.accumulate
        self._next_key = BatchKey(config.seed, first_step, process, 0)
        self._futures: list[Future[MicroBatch]] = []
        self._pool = ThreadPoolExecutor(max_workers=1)

    def __enter__(self) -> "MicroBatches":
        for _ in range(self.DEPTH):
            self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(wait=True, cancel_futures=True)

    def next(self) -> MicroBatch:
        """Return the next micro-batch: all of a step, then those of the next step."""
        batch = self._futures.pop(0).result()
        self._submit()
        return batch

    def _submit(self) -> None:
        key = self._next_key
        self._futures.append(self._pool.submit(draw, self._task, key))
        is_last = key.micro + 1 == self._accumulate
        self._next_key = key._replace(
            step=key.step + 1 if is_last else key.step, micro=0 if is_last else key.micro + 1
        )


def draw(task: "Task", key: BatchKey) -> MicroBatch:
    """Draw the micro-batch of a key."""
    tensors = task.make_batch(key.generator())
    if task.takes_step:
        tensors["step"] = torch.tensor(key.step)
    return MicroBatch(
        key=key,
        tensors=tensors,
        units=0 if task.count_units is None else task.count_units(tensors),
        flops=0.0 if task.count_flops is None else task.count_flops(tensors),
    )
