"""Work in several processes of this machine, in the order of the tasks."""

import errno
import multiprocessing
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

from duotok.tokenizer.common.errors import DataError, DuoTokError

TaskT = TypeVar("TaskT")
DIED = "its process died: too little memory (try fewer --workers), or a decoder that crashed"


def run_in_processes(
    tasks: Iterable[TaskT],
    work: Callable[[Any], Any],
    workers: int,
    start: Callable[..., object] | None,
    arguments: tuple,
) -> Generator[tuple[TaskT, Any], None, None]:
    """Do what `Workers.run` does, in so many processes."""

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
    return DIED if isinstance(error, BrokenProcessPool) else tell_reason(error)


def tell_reason(error: BaseException) -> str:
    """Return why an item gave no result, in one line; raise DataError where the disk is at fault."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
        raise DataError(
            f"cannot write: {error.strerror}; make room and run the same command again"
        ) from error
    text = " ".join(str(error).split())[:300]
    return text if isinstance(error, DuoTokError) else f"{type(error).__name__}: {text}"
