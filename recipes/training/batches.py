"""The data loading of a run: micro-batches, each a pure function of (seed, step, process, micro-batch)."""

import contextlib
import itertools
import multiprocessing
import os
import signal
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

MOST_WORKERS = 4  # that are started unasked


class BatchKey(NamedTuple):
    """What a micro-batch and the random numbers of its pass are drawn from."""

    seed: int
    step: int  # optimizer steps taken before
    process: int
    micro: int  # 0 to train.accumulate - 1

    def generator(self) -> np.random.Generator:
        """Return the generator that the batch is drawn with."""
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
        return {name: tensor.to(device, non_blocking=True) for name, tensor in self.tensors.items()}

    def pin_memory(self) -> "MicroBatch":
        """Return the batch in page-locked memory, from where it is copied while the GPU computes."""
        pinned = {name: tensor.pin_memory() for name, tensor in self.tensors.items()}
        return MicroBatch(self.key, pinned, self.units, self.flops)


class MicroBatches(Dataset[MicroBatch | DuoTokError]):
    """All micro-batches of a process, by number: those of step 0, then those of step 1, and so on."""

    def __init__(self, task: Task, config: TrainConfig, *, process: int) -> None:
        self._task, self._seed, self._accumulate = task, config.seed, config.accumulate
        self._process = process

    def __getitem__(self, number: int) -> MicroBatch | DuoTokError:
        step, micro = divmod(number, self._accumulate)
        task, key = self._task, BatchKey(self._seed, step, self._process, micro)
        try:
            if task.seek is not None:
                task.seek(key.seed, key.process, key.step)
            tensors = task.make_batch(key.generator())
        except DuoTokError as error:
            return error  # raised in a worker it would come with the worker's traceback
        if task.takes_step:
            tensors["step"] = torch.tensor(key.step)
        units = 0 if task.count_units is None else task.count_units(tensors)
        flops = 0.0 if task.count_flops is None else task.count_flops(tensors)
        return MicroBatch(key, tensors, units, flops)


@contextlib.contextmanager
def open_batches(
    task: Task, config: TrainConfig, *, process: int, first_step: int, device: torch.device
) -> Iterator[Iterator[MicroBatch]]:
    """Give the micro-batches of a process from a step on, without end, drawn ahead by train.workers."""
    workers = choose_workers(config, device)
    loader = DataLoader(
        MicroBatches(task, config, process=process),
        batch_size=None,
        sampler=itertools.count(first_step * config.accumulate),  # pyright: ignore[reportArgumentType]
        collate_fn=lambda batch: batch,
        num_workers=workers,
        # A recipe's make_batch is a closure, which only a fork takes along.
        multiprocessing_context="fork" if workers else None,
        worker_init_fn=_start_worker,
        pin_memory=device.type == "cuda",
        generator=torch.Generator(),  # its own: the loop's random numbers stay untouched
    )
    batches = _raise_errors(iter(loader))
    try:
        yield batches
    finally:
        batches.close()  # and with it the workers


def choose_workers(config: TrainConfig, device: torch.device) -> int:
    """Return how many processes draw batches: train.workers, or a share of the cores where CUDA trains."""
    can_fork = "fork" in multiprocessing.get_all_start_methods()
    if config.workers and not can_fork:
        raise ConfigError(
            f"train.workers is {config.workers}, but this system forks no processes; set it to 0"
        )
    if config.workers is not None:
        return config.workers
    local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    spare = (os.cpu_count() or 1) // local_processes - 1
    return max(0, min(MOST_WORKERS, spare)) if device.type == "cuda" and can_fork else 0


def _raise_errors(batches: Iterator[MicroBatch | DuoTokError]) -> Generator[MicroBatch, None, None]:
    for batch in batches:
        if isinstance(batch, DuoTokError):
            del batches  # whoever keeps the error would keep the workers alive through its traceback
            raise batch
        yield batch


def _start_worker(_: int) -> None:
    # Not the training process's handler, which would tell of the run's end.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
