"""Workers: threads that take songs out of the queue and make them with one model.

Threads, for the pipeline permits it: a model is only read while it plays; what a song needs beside it (caches
of the decoder, generators of chance, files) is made for each; and how many threads torch computes with is a
matter of the thread that asks. Processes would need a model each.
"""

import os
import threading
import time
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from duotok.recipes.accompany.output import REPORT
from duotok.recipes.accompany.stages import WholeProgress
from duotok.recipes.service.queue import Song, SongQueue
from duotok.recipes.service.settings import name_recordings, read_request
from duotok.tokenizer.common.errors import DuoTokError
from duotok.tokenizer.common.files import read_json

if TYPE_CHECKING:
    from duotok.recipes.accompany.pipeline import Accompanist, Sketches
    from duotok.recipes.accompany.repaint import Repainting
    from duotok.recipes.accompany.request import Request
    from duotok.recipes.accompany.stages import Progress

_OFTEN_SECONDS = 0.2  # between two notes of the same stage
_IDLE_SECONDS = 1.0  # after which a worker looks whether it is still wanted


class _StoppedError(Exception):
    """The song is not to be made on: it was cancelled, or the service ends."""


class Workers:
    """Makes the songs of a queue until it is told to stop."""

    def __init__(self, queue: SongQueue, accompanist: "Accompanist", count: int = 1) -> None:
        import torch

        self._queue, self._accompanist, self.count = queue, accompanist, count
        self._threads_each = max(1, torch.get_num_threads() // count)
        self._ending = threading.Event()
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Start the workers; again, in place of those that have died of a fault."""
        self._threads = [thread for thread in self._threads if thread.is_alive()]
        for _ in range(self.count - len(self._threads)):
            name = f"worker-{uuid.uuid4().hex}"
            self._threads.append(threading.Thread(target=self._work, args=(name,), name=name, daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Stop at the next progress of each; songs that are begun wait for the next start."""
        self._ending.set()
        for thread in self._threads:
            thread.join()

    def _work(self, name: str) -> None:
        import torch

        # Asked of each thread: a new one has as many as another has set for itself at the moment.
        torch.set_num_threads(self._threads_each)
        while not self._ending.is_set():
            song = self._queue.claim(name, wait_seconds=_IDLE_SECONDS)
            if song is not None:
                self._make(song, name)

    def _make(self, song: Song, worker: str) -> None:
        queue, files = self._queue, self._queue.given(song)
        try:
            queue.finish(song.id, worker, self._write(song, files, worker))
        except _StoppedError:
            queue.give_back(song.id, worker)
        except DuoTokError as error:
            told = name_recordings(str(error), {files[stored]: name for stored, name in song.names.items()})
            queue.fail(song.id, worker, told.replace(f"{queue.folder}{os.sep}", ""))
        except (
            BaseException
        ) as error:  # a fault of ours; the worker ends with it, and another takes its place
            queue.fail(song.id, worker, f"the service could not make this song ({type(error).__name__})")
            raise

    def _write(self, song: Song, files: Mapping[str, Path], worker: str) -> Mapping[str, Any]:
        queue, request = self._queue, read_request(song.settings, files, song.names)
        whole, last_stage, next_time = WholeProgress(request.renderings), "", 0.0

        def tell(stage: str, share: float, ranking: Sequence[Mapping[str, Any]] | None = None) -> None:
            nonlocal last_stage, next_time
            place, now = whole.tell(stage, share), time.monotonic()
            if self._ending.is_set():
                raise _StoppedError
            if ranking is None and stage == last_stage and now < next_time:
                return
            last_stage, next_time = stage, now + _OFTEN_SECONDS
            if not queue.progress(song.id, worker, stage, place, ranking):
                raise _StoppedError

        sketches = self._compose(song, request, tell)
        tell("compose", 1.0, describe_ranking(sketches))
        work = queue.work_folder(song.id)
        self._accompanist.write_sketches(sketches, work)
        return read_json(work / REPORT)

    def _compose(self, song: Song, request: "Request", tell: "Progress") -> "Sketches | Repainting":
        """Compose a song; whoever listens hears its mix meanwhile, where the model can."""
        from duotok.recipes.accompany.stream import WavStream
        from duotok.renderer.renderer import Renderer

        queue, accompanist = self._queue, self._accompanist
        if request.repaint is not None or not isinstance(accompanist.bundle.sound, Renderer):
            return accompanist.compose(request, progress=tell)
        live = queue.live_file(song.id)
        live.unlink(missing_ok=True)  # of an attempt that ended
        with WavStream(str(live), is_heard=partial(queue.is_heard, song.id)) as stream:
            return accompanist.compose(request, progress=tell, stream=stream)


def describe_ranking(sketches: "Sketches | Repainting") -> list[dict[str, Any]]:
    """The candidates of a song before they are sound, best first, as the report describes them later."""
    return [
        {"rank": rank, "seed": each.seed, "style": each.style, "ranking": each.fit.describe()}
        for rank, each in enumerate(sketches.ranked, start=1)
    ]
