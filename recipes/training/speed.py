"""How fast a device multiplies matrices, and the most memory a run took."""

import time

import torch

from duotok.recipes.evaluation.speed import peak_memory_gb as peak_process_memory_gb

MEASURED_SECONDS = 0.3
CPU_WIDTH, ACCELERATOR_WIDTH = 1024, 8192


def peak_memory_gb(device: torch.device) -> float:
    """Most memory so far in 10^9 bytes: allocated tensors on CUDA, the whole process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return peak_process_memory_gb()


def measure_peak_flops(device: torch.device, precision: str) -> float:
    """Return the FLOP/s of the device in a run's precision ("bf16" or "no"), as a large product reaches it.

    Two square matrices (1,024 wide on a CPU, 8,192 elsewhere) are multiplied again and again for 0.3 s after
    one warm-up; a product of width n counts 2 n^3 FLOPs, and the fastest one counts. That is what this
    machine can do with this build of torch and this number of threads, below the maker's figure: a
    utilization against it says what is lost to everything that is not a large product.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    width = CPU_WIDTH if device.type == "cpu" else ACCELERATOR_WIDTH
    left, right = (torch.full((width, width), 0.5, dtype=dtype, device=device) for _ in range(2))
    out = left @ right
    _wait(device)
    fastest, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < MEASURED_SECONDS:
        start = time.perf_counter()
        torch.matmul(left, right, out=out)
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2 * width**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
