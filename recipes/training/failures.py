"""What ends a run from outside, in one line each: no memory, another process gone, a signal to stop."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from duotok.recipes.training.meter import NotFinite
from duotok.recipes.training.run_state import RunState
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import DuoTokError

NO_MEMORY = ("out of memory", "can't allocate memory", "cannot allocate memory")
# gloo's and NCCL's words when the other end of a connection is gone.
LOST_PROCESS = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection refused")
LOST_PROCESS += ("socket timeout", "timed out waiting", "remote process exited", "communicator was aborted")


@contextmanager
def explained_failures(
    config: TrainConfig, objective: nn.Module, state: RunState | None, out: Path
) -> Iterator[None]:
    """Turn what ends the block from outside into one DuoTokError that says what to do."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        told = str(error).lower()
        where = "before the first step"
        if state is not None:
            where = f"at step {state.step + 1}; {describe_checkpoint(state, out)}"
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(w in told for w in NO_MEMORY):
            raise DuoTokError(f"out of memory {where}; {_advise_memory(config, objective)}") from error
        if is_lost_process(error):
            raise DuoTokError(
                f"process {os.environ.get('RANK', 0)}: another process of this run has died {where}; start "
                "the same command again to go on"
            ) from error
        if "dataloader worker" in told:
            raise DuoTokError(
                f"a process that draws batches was killed {where}; lower train.workers ({config.workers}): "
                "each takes memory of its own, and start the same command again"
            ) from error
        raise


def is_lost_process(error: BaseException) -> bool:
    """Say whether a collective operation failed because another process is gone."""
    return any(words in str(error).lower() for words in LOST_PROCESS)


@contextmanager
def stopped_by_signal(state: RunState, out: Path) -> Iterator[None]:
    """Say what is left when the run is told to end (SIGTERM), as a launcher does when a process has died."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only a main thread may set handlers
        return

    def stop(*_: object) -> None:
        # At once: a process that waits for a dead one may never come back to raise an error.
        print(
            f"error: process {os.environ.get('RANK', 0)}: told to end (SIGTERM) at step {state.step + 1}; "
            f"{tell_checkpoint(state.saved_step, out)}; start the same command again to go on",
            file=sys.stderr,
            flush=True,
        )
        os._exit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def describe_checkpoint(state: RunState, out: Path) -> str:
    """Return a clause about the last checkpoint, when the one that is being written is done."""
    state.settle()
    return tell_checkpoint(state.saved_step, out)


def tell_checkpoint(step: int | None, out: Path) -> str:
    """Return a clause about the checkpoint of a step, None: that there is none."""
    good = f"the last good checkpoint is {out / 'checkpoint'}, of step {step}"
    return "there is no checkpoint yet" if step is None else good


def refuse_not_finite(found: NotFinite | None, task: Task, state: RunState, out: Path) -> None:
    """Raise DuoTokError where a loss or gradient is NaN or infinite: step, batch, cause, what is left."""
    if found is None:
        return
    key = found.key
    where = f"step {key.step + 1}, process {key.process}"
    if found.what == "loss":
        where += f", micro-batch {key.micro}, drawn by np.random.default_rng({tuple(key)})"
    raise DuoTokError(
        f"the {found.what} is not finite at {where}; {_blame(found, task)}; {describe_checkpoint(state, out)}"
    )


def _blame(found: NotFinite, task: Task) -> str:
    if found.what == "loss":
        batch = task.make_batch(found.key.generator())
        broken = [n for n, t in batch.items() if t.is_floating_point() and not bool(t.isfinite().all())]
        if broken:
            return f"its {broken[0]!r} holds NaN or infinite values: mend the data"
    return "its data are finite: lower train.learning_rate or train.gradient_clip"


def _advise_memory(config: TrainConfig, objective: nn.Module) -> str:
    advice = (
        f"lower train.batch_size ({config.batch_size}) and raise train.accumulate ({config.accumulate}) "
        "by the same factor"
    )
    configs = [getattr(module, "config", None) for module in objective.modules()]
    if any(getattr(c, "gradient_checkpointing", None) is False for c in configs):
        advice += ", or set model.gradient_checkpointing=true"
    elif not config.gradient_checkpointing and any(isinstance(m, nn.ModuleList) for m in objective.modules()):
        advice += ", or set train.gradient_checkpointing=true"
    return advice + ", or use ZeRO 3 with --deepspeed"
