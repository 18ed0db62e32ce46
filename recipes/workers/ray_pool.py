"""The same on a Ray cluster: actors that start once, one task in flight for each, retries where one dies."""

import logging
import os
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from contextlib import suppress
from importlib import import_module
from typing import Any, TypeVar, cast

from duotok.recipes.workers.processes import DIED, tell_reason
from duotok.tokenizer.common.errors import ConfigError, DataError

TaskT = TypeVar("TaskT")
_TRIES = 3  # of a task whose actor dies; a machine that leaves the cluster is no fault of the task
_LOST_STARTS = 20  # of machines that go away; with more the cluster is of no use
_KNOCK_SECONDS = 10.0
# What a client of gRPC, which Ray speaks, says first; each server answers by a frame of settings (RFC 9113).
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes([0, 0, 0, 4, 0, 0, 0, 0, 0])
_SETTINGS = 4  # fourth byte of such a frame
_AHEAD = 4  # results per actor that wait for an earlier one, before no more tasks are handed out


class _Actor:
    """A process of the cluster; what `start` makes is kept between tasks."""

    def __init__(self, folder: str, start: Callable[..., object] | None, arguments: tuple) -> None:
        with suppress(OSError):  # so that paths mean the same; a machine without that folder needs full ones
            os.chdir(folder)
        if start is not None:
            start(*arguments)

    def wait(self) -> None:
        """Return as soon as it has started."""

    def work(self, work: Callable[[Any], Any], task: Any) -> Any:
        """Do a task."""
        return work(task)


def connect(address: str) -> Any:
    """Return Ray, connected to the cluster at an address; ConfigError where there is none."""
    try:
        import ray
    except ImportError as error:
        raise ConfigError("--ray needs Ray; install it by: pip install 'duotok[ray]'") from error
    if ray.is_initialized():
        return ray
    try:
        _knock(address)
        ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)
    except (OSError, RuntimeError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise ConfigError(
            f"no Ray of this version answers at {address} ({told}); start one by 'ray start --head', or "
            "leave out --ray"
        ) from error
    return ray


def _knock(address: str) -> None:
    """Raise OSError soon where no Ray listens at an address with a port: Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not port.isdigit():
        return
    with socket.create_connection((host.strip("[]"), int(port)), timeout=_KNOCK_SECONDS) as line:
        if os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true"):
            return
        line.sendall(_HELLO)
        if line.recv(9)[3:4] != bytes([_SETTINGS]):
            raise OSError("something else listens there")


def _by_name(function: Callable | None) -> Callable | None:
    """Return a function of the program that runs, as its module has it: what is in __main__ Ray copies.

    Every copy has globals of its own, in which `work` would not find what `start` has left.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or function is None or function.__module__ != "__main__":
        return function
    return getattr(import_module(spec.name), function.__qualname__)


def run_on_ray(
    tasks: Iterable[TaskT],
    work: Callable[[Any], Any],
    workers: int,
    address: str,
    gpus: float,
    start: Callable[..., object] | None,
    arguments: tuple,
) -> Generator[tuple[TaskT, Any], None, None]:
    """Do what `Workers.run` does, by so many actors on the cluster at an address."""
    ray = connect(address)
    start, work = _by_name(start), cast(Callable[[Any], Any], _by_name(work))
    make = ray.remote(num_cpus=1, num_gpus=gpus)(_Actor).remote
    starting: dict[Any, Any] = {}  # what tells that an actor is ready -> the actor
    running: dict[Any, tuple[Any, int, TaskT, int]] = {}  # result -> actor, number, task, earlier tries
    idle: list[Any] = []
    again: deque[tuple[int, TaskT, int]] = deque()
    finished: dict[int, tuple[TaskT, Any]] = {}
    source, handed, given, lost_starts = enumerate(tasks), 0, 0, 0

    def begin() -> None:
        actor = make(os.getcwd(), start, arguments)
        starting[actor.wait.remote()] = actor

    def next_task() -> tuple[int, TaskT, int] | None:
        if again:
            return again.popleft()
        # A slow task must not make the results of all later ones pile up.
        if handed - given >= _AHEAD * workers:
            return None
        return next(((number, task, 0) for number, task in source), None)

    try:
        for _ in range(workers):
            begin()
        while True:
            while idle and (found := next_task()) is not None:
                number, task, tries = found
                handed = max(handed, number + 1)
                actor = idle.pop()
                running[actor.work.remote(work, task)] = (actor, number, task, tries)
            if not running and (idle or not starting):
                return
            ready, _ = ray.wait([*running, *starting], num_returns=1)
            if ready[0] in starting:
                actor = starting.pop(ready[0])
                try:
                    ray.get(ready[0])
                    idle.append(actor)
                except ray.exceptions.RayError as error:
                    lost_starts += 1
                    if getattr(error, "actor_init_failed", False) or lost_starts > _LOST_STARTS:
                        told = str(error).strip().splitlines()[-1][:300]
                        raise DataError(f"a worker of the Ray cluster cannot start: {told}") from error
                    begin()
                continue
            actor, number, task, tries = running.pop(ready[0])
            try:
                finished[number] = task, ray.get(ready[0])
                idle.append(actor)
            except ray.exceptions.RayTaskError as error:
                finished[number] = task, tell_reason(error.cause)
                idle.append(actor)
            except ray.exceptions.RayError:  # the actor, its machine, or the result on it is gone
                ray.kill(actor)
                begin()
                if tries + 1 < _TRIES:
                    again.append((number, task, tries + 1))
                else:
                    finished[number] = task, DIED
            while given in finished:
                yield finished.pop(given)
                given += 1
    finally:
        for actor in [*idle, *starting.values(), *(each[0] for each in running.values())]:
            ray.kill(actor)
