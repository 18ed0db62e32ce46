"""Work on many things in several processes; one that fails or kills its process does not stop the rest."""

import argparse
import errno
import multiprocessing
import re
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from duotok.tokenizer.common.errors import DataError, DuoTokError

TaskT = TypeVar("TaskT")


def run_all(
    tasks: Iterable[TaskT],
    work: Callable[[Any], Any],
    *,
    workers: int,
    start: Callable[..., object] | None = None,
    arguments: tuple = (),
) -> Generator[tuple[TaskT, Any], None, None]:
    """Yield (task, result of work, or a text that says why there is none), in the order of the tasks.

    start(*arguments) runs first in every process. A full disk is the one failure that ends the run.
    """

    def new_pool(size: int) -> ProcessPoolExecutor:
        context = multiprocessing.get_context("spawn")  # a fork after torch has threads can hang
        return ProcessPoolExecutor(size, context, initializer=start, initargs=arguments)

    source = iter(tasks)
    pool = new_pool(workers)
    waiting: deque[tuple[TaskT, Future]] = deque()
    try:
        while True:
            while len(waiting) < workers + 1 and (task := next(source, None)) is not None:
                waiting.append((task, _submit(pool, work, task)))
            if not waiting:
                return
            task, future = waiting.popleft()
            if not isinstance(future.exception(), BrokenProcessPool):
                yield task, _result(future)
                continue
            # Some task has killed its process, nobody knows which: each now gets a process of its own.
            pool.shutdown(wait=True, cancel_futures=True)
            suspects = [task, *(each for each, _ in waiting)]
            waiting.clear()
            for suspect in suspects:
                pool = new_pool(1)
                future = pool.submit(work, suspect)
                outcome = _result(future)
                pool.shutdown(wait=True)
                yield suspect, outcome
            pool = new_pool(workers)
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _submit(pool: ProcessPoolExecutor, work: Callable[[Any], Any], task: Any) -> Future:
    try:
        return pool.submit(work, task)
    except BrokenProcessPool as error:  # an earlier task has just killed its process
        future: Future = Future()
        future.set_exception(error)
        return future


def _result(future: Future) -> Any:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, BrokenProcessPool):
        return "its process died: too little memory, or a decoder that crashed"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise DataError(
            f"cannot write: {error.strerror}; make room and run the same command again"
        ) from error
    if isinstance(error, DuoTokError):
        return str(error)
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def parse_shard(text: str) -> tuple[int, int]:
    """The type of an option --shard I/N: part I of N, I from 1 on."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if match is None or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"{text!r} must be I/N with I from 1 to N, for example 1/8")
    return int(match[1]), int(match[2])
