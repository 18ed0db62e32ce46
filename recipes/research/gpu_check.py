"""What training and generation take on this machine's GPU, measured in at most six minutes.

Run: python -m duotok.recipes.research.gpu_check --out gpu_check
Writes OUT/gpu_check.json after every part and, at the end, the table OUT/gpu.md for docs/gpu.md. Every part
has a process and a time of its own: one that fails leaves the others their figures, and its reason in the
table. `--size tiny --device cpu` rehearses it without a GPU.
"""

import argparse
import multiprocessing
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.common.files import write_json, write_text

Figures = dict[str, Any]
PATIENCE_ON_CPU = 10  # times the seconds that a part may take


class Part(NamedTuple):
    """Something that gpu_measurements measures, and the seconds that it may take: together six minutes."""

    title: str
    seconds: float


PARTS = {
    "device": Part("Device", 45),  # and what all of them import
    "lm_sdpa": Part("LM, SDPA", 45),
    "lm_flash": Part("LM, flash-attention", 45),
    "lm_compiled": Part("LM, SDPA, compiled", 75),
    "decoder": Part("Diffusion decoder", 40),
    "tokenizer": Part("Tokenizer, stage 3", 35),
    "zero2": Part("ZeRO 2, one process", 35),
    "compose": Part("Composing", 25),
    "generate": Part("generate, shipped bundle", 15),
}


def run_part(sender: Connection, name: str, size: str, device: str) -> None:
    """Measure a part in this process and send its figures, or why there are none."""
    import torch

    from duotok.recipes.research.gpu_measurements import MEASUREMENTS, SIZES

    try:
        torch.manual_seed(0)
        found = MEASUREMENTS[name](SIZES[size], torch.device(device))
    except (RuntimeError, ValueError, OSError, ImportError, MemoryError, AssertionError) as error:
        found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    sender.send(found)
    sender.close()


def measure_apart(name: str, size: str, device: str) -> Figures:
    """Return the figures of a part, measured in a process of its own that is ended when its time is over."""
    # Processes are forked from one that has imported everything and never asks for the GPU itself.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["duotok.recipes.research.gpu_measurements"])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=run_part, args=(sender, name, size, device))
    process.start()
    sender.close()
    seconds = PARTS[name].seconds * (1 if device == "cuda" else PATIENCE_ON_CPU)
    try:
        if not receiver.poll(seconds):
            return {"failed": f"not done in {seconds:g} s"}
        found = receiver.recv()
        process.join(5)  # leaves in its own way where it can
        return found
    except EOFError:
        return {"failed": "its process died"}
    finally:
        process.kill()
        process.join()


def write_table(found: dict[str, Figures], size: str) -> str:
    """Return the figures as a page of Markdown."""
    device = found.get("device", {})
    told = ", ".join(f"{key} {_show(value)}" for key, value in device.items() if key != "name")
    lines = [f"### {device.get('name', 'unknown device')}, size {size}", "", told, ""]
    lines += ["| part | figures |", "|---|---|"]
    for name, figures in found.items():
        if name != "device":
            cells = "; ".join(f"{key} {_show(value)}" for key, value in figures.items())
            lines.append(f"| {PARTS[name].title} | {cells} |")
    return "\n".join(lines) + "\n"


def _show(value: Any) -> str:
    return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}" if type(value) is int else str(value)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.research.gpu_check",
        description="What training and generation take on this machine's GPU.",
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu_check.json and gpu.md")
    parser.add_argument("--size", choices=("base", "tiny"), default="base")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="default: all of them")
    arguments = parser.parse_args(argv)
    return guard(lambda: _run(arguments))


def _run(arguments: argparse.Namespace) -> None:
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # a question whether there is CUDA spoils forks
    found: dict[str, Figures] = {}
    for name in arguments.parts:
        start = time.perf_counter()
        found[name] = measure_apart(name, arguments.size, arguments.device)
        print(f"{PARTS[name].title}: {time.perf_counter() - start:.1f} s, {found[name]}", flush=True)
        write_json(arguments.out / "gpu_check.json", {"size": arguments.size, "parts": found})
    write_text(arguments.out / "gpu.md", write_table(found, arguments.size))
    failed = [name for name, figures in found.items() if "failed" in figures]
    if len(failed) == len(found):
        raise ConfigError(f"nothing could be measured on {arguments.device}: {found[failed[0]]['failed']}")


if __name__ == "__main__":
    sys.exit(main())
