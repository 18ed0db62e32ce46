"""What the processes of a run did since its last log row: losses, speed, and what is not finite."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.benchmark import Timer

from duotok.recipes.training.batches import BatchKey, MicroBatch
from duotok.recipes.training.task import Task
from duotok.tokenizer.common.command import peak_memory_gb

MEASURED_SECONDS = 0.3
CPU_WIDTH, ACCELERATOR_WIDTH = 1024, 8192


class NotFinite(NamedTuple):
    """The first number of a run that is NaN or infinite."""

    key: BatchKey
    what: str  # "loss" or "gradient"


class Meter:
    """Adds up on the device; the processes meet, and the device is waited for, only when a row is due."""

    def __init__(self, task: Task, accelerator: Accelerator, precision: str) -> None:
        self._task, self._device = task, accelerator.device
        # All processes measure at once, as they will compute at once.
        self._peak_flops = 0.0 if task.count_flops is None else measure_peak_flops(self._device, precision)
        self._unseen: list[tuple[NotFinite, Tensor]] = []
        self._norm: Tensor | float | None = None
        self._start()

    def add(self, batch: MicroBatch, losses: dict[str, Tensor]) -> None:
        """Count a micro-batch and its named losses."""
        for name, value in losses.items():
            total, count = self._losses.get(name, (0.0, 0))
            self._losses[name] = (total + value.detach(), count + 1)
        self._units += batch.units
        self._flops += batch.flops
        self._unseen.append((NotFinite(batch.key, "loss"), losses["total"].detach()))

    def add_norm(self, norm: Tensor | float | None) -> None:
        """Note the gradient norm of the last micro-batch's step (ZeRO 0 in fp32 clips without telling it)."""
        self._norm = norm
        if norm is not None:
            key = self._unseen[-1][0].key
            self._unseen.append((NotFinite(key, "gradient"), torch.as_tensor(norm)))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time that does not count as training: validation and checkpoints."""
        start = time.monotonic()
        try:
            yield
        finally:
            self._begin += time.monotonic() - start

    def find_not_finite(self) -> NotFinite | None:
        """Say which number was the first that is not finite; every process gets the same answer."""
        found = [finding for own in gather_object([self._look()]) for finding in own]
        # A loss before the gradient that it spoils on every process.
        return min(found, key=lambda f: (f.key.step, f.what != "loss", f.key), default=None)

    def take_row(self) -> dict[str, float]:
        """Return the means since the last row over steps, micro-batches and processes, and start anew.

        The gradient norm is the last step's; the memory, in 10^9 bytes, that of the process that took most:
        of tensors on CUDA, of the whole process on a CPU.
        """
        on_cuda = self._device.type == "cuda"
        memory = torch.cuda.max_memory_allocated(self._device) / 1e9 if on_cuda else peak_memory_gb()
        own = {
            "losses": {name: (float(total), count) for name, (total, count) in self._losses.items()},
            "units": self._units,
            "flops": self._flops,
            "peak_flops": self._peak_flops,
            "memory": memory,
        }
        seconds = max(time.monotonic() - self._begin, 1e-9)
        everyone: list[dict[str, Any]] = gather_object([own])
        row = {} if self._norm is None else {"gradient_norm": float(self._norm)}
        if self._task.count_units is not None:
            row[f"{self._task.unit}_per_second"] = sum(one["units"] for one in everyone) / seconds
        if self._peak_flops:
            possible = sum(one["peak_flops"] for one in everyone) * seconds
            row["mfu"] = sum(one["flops"] for one in everyone) / possible
        row["peak_memory_gb"] = max(one["memory"] for one in everyone)
        for name in dict.fromkeys(name for one in everyone for name in one["losses"]):
            pairs = [one["losses"][name] for one in everyone if name in one["losses"]]
            row[name] = sum(total for total, _ in pairs) / sum(count for _, count in pairs)
        self._start()
        return row

    def _start(self) -> None:
        self._losses: dict[str, tuple[Tensor | float, int]] = {}
        self._units, self._flops = 0, 0.0
        self._begin = time.monotonic()

    def _look(self) -> list[NotFinite]:
        """Findings of this process; looking again finds nothing twice."""
        unseen, self._unseen = self._unseen, []
        if not unseen:
            return []
        values = torch.stack([value.float().to(self._device) for _, value in unseen]).tolist()
        return [what for (what, _), value in zip(unseen, values, strict=True) if not math.isfinite(value)]


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of the device in a run's precision ("bf16" or "no"), as a large product reaches it.

    The fastest of products of square matrices within 0.3 s, 2 n^3 FLOPs each. It is below the maker's figure:
    a utilization against it says what is lost to everything that is not a large product.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    width = CPU_WIDTH if device.type == "cpu" else ACCELERATOR_WIDTH
    left, right = (torch.full((width, width), 0.5, dtype=dtype, device=device) for _ in range(2))
    names = {"left": left, "right": right, "out": left @ right, "matmul": torch.matmul}
    timer = Timer("matmul(left, right, out=out)", globals=names, num_threads=torch.get_num_threads())
    return 2 * width**3 / min(timer.blocked_autorange(min_run_time=MEASURED_SECONDS).times)
