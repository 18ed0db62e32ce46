"""Many songs at once and a service that is killed meanwhile: is each made, each once, in how much memory?

Run: python -m duotok.recipes.evaluation.load --jobs 100 [--bundle DIR] [--kills 2] [--out load.json]
`serve` runs as a process of its own; it is killed as by a power cut (SIGKILL) and started again. With --batch
it is `batch` that makes as many songs of many lengths, one after the other, and its memory must stay flat.
"""

import argparse
import io
import json
import re
import secrets
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DuoTokError
from duotok.tokenizer.common.files import write_json

_LOOK_SECONDS = 0.5
_START_SECONDS = 600  # a machine that serves others as well takes its time to load a model
_RATE_HZ = 48_000
_SEEDS_APART = 1_000  # more than candidates of a song, whose seeds follow one another
_LENGTHS = 20  # of the songs of a batch
_MOST_GROWTH = 0.05  # of a batch's memory, from the second to the last quarter
_KILLED_BY = 0.4  # share of the songs after which the last process lives on, for its memory to be seen


class LoadError(DuoTokError):
    """The service does not answer, or has not kept what it promises."""


class _Service:
    """`serve` as a process."""

    def __init__(self, data: Path, bundle: Path | None, workers: int, jobs: int) -> None:
        command = [sys.executable, "-m", "duotok.recipes.service.serve", "--port=0", f"--data={data}"]
        command += [f"--workers={workers}", f"--most-queued={jobs}"]
        command += [] if bundle is None else [f"--model={bundle}"]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().partition(": ")[0]  # empty where it has ended
        if not self.url:
            raise LoadError(f"the service did not start; it ended with {self.process.wait()}")

    def ask(self, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
        """The JSON answer to a request."""
        request = urllib.request.Request(self.url + path, body, headers or {})
        try:
            with urllib.request.urlopen(request, timeout=_START_SECONDS) as answer:
                return json.load(answer)
        except OSError as error:
            raise LoadError(f"the service does not answer {path}: {error}") from error

    def memory_bytes(self) -> int:
        """What the process holds in memory."""
        found = _memory_of(self.process.pid)
        if not found:
            raise LoadError("the service has ended by itself")
        return found

    def end(self, number: int) -> None:
        """End the process by a signal."""
        self.process.send_signal(number)
        self.process.communicate()


def _memory_of(process: int) -> int:
    """What a process and those that it has begun hold in memory in bytes; 0 where it has ended."""
    found = 0
    with suppress(OSError):
        status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
        found = sum(int(held) * 1024 for held in re.findall(r"^VmRSS:\s+(\d+)", status, flags=re.MULTILINE))
        children = [
            path.read_text(encoding="ascii") for path in Path(f"/proc/{process}/task").glob("*/children")
        ]
        found += sum(_memory_of(int(child)) for child in " ".join(children).split())
    return found


def measure_batch(folder: Path, vocal: bytes, *, jobs: int, bundle: Path | None = None) -> dict[str, Any]:
    """Let `batch` accompany so many beginnings of a vocal, half of it and longer; return figures."""
    import soundfile

    wave, rate_hz = soundfile.read(io.BytesIO(vocal))
    rows = []
    for number in range(jobs):
        name = f"{number % _LENGTHS}.wav"
        soundfile.write(
            folder / name, wave[: len(wave) * (_LENGTHS + number % _LENGTHS + 1) // (2 * _LENGTHS)], rate_hz
        )
        rows.append(json.dumps({"id": str(number), "vocal": name, "seed": number}))
    (folder / "songs.jsonl").write_text("\n".join(rows), encoding="utf-8")
    command = [sys.executable, "-m", "duotok.recipes.batch", f"--songs={folder}/songs.jsonl"]
    command += [f"--out={folder}/out", *([] if bundle is None else [f"--model={bundle}"])]
    began, memory = time.monotonic(), dict[int, int]()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            done, held = sum(1 for _ in folder.glob("out/*/report.json")), _memory_of(process.pid)
            if 0 < done < jobs:  # with the last one the workers end
                memory[done] = held
            time.sleep(_LOOK_SECONDS)
    finally:
        process.terminate()
        ended = process.wait()
    if ended or not memory:
        raise LoadError(f"batch ended with {ended}, after {len(memory)} looks at its memory")
    seconds = round(time.monotonic() - began, 1)
    return {"jobs": jobs, "lengths": _LENGTHS, "seconds": seconds, **_describe_memory(memory)}


def measure_load(
    data: Path, vocal: bytes, *, jobs: int, bundle: Path | None = None, kills: int = 2, workers: int = 1
) -> dict[str, Any]:
    """Send a vocal (the bytes of a WAV) so many times at once, kill the service meanwhile; return figures."""
    began, form = (
        time.monotonic(),
        [_make_form({"seed": str(_SEEDS_APART * number)}, vocal) for number in range(jobs)],
    )
    kill_at = [round(jobs * _KILLED_BY * (number + 1) / kills) for number in range(kills)]
    seen: dict[str, tuple[int, int]] = {}  # song -> which report it had when it was first found done
    memory: dict[int, int] = {}  # songs done -> bytes of the last process
    restarts, service = 0, _Service(data, bundle, workers, jobs)
    try:
        with ThreadPoolExecutor(min(jobs, 100)) as pool:
            accepted = list(pool.map(lambda each: service.ask("/songs", *each)["id"], form))
        accepted_seconds, done = time.monotonic() - began, 0
        while done < jobs:
            time.sleep(_LOOK_SECONDS)
            health = service.ask("/health")
            done = jobs - health["queued"] - health["running"]
            if restarts < kills and done >= kill_at[restarts]:
                service.end(signal.SIGKILL)
                for song_id, report in _find_reports(data).items():
                    seen.setdefault(song_id, report)
                restarts, memory, service = restarts + 1, {}, _Service(data, bundle, workers, jobs)
                done = 0
            else:
                memory[done] = service.memory_bytes()
        seconds = time.monotonic() - began
        songs = [service.ask(f"/songs/{song_id}") for song_id in accepted]
    finally:
        service.end(signal.SIGTERM)
    reports = _find_reports(data)
    with closing(sqlite3.connect(data / "songs.sqlite")) as database:
        attempts = [row[0] for row in database.execute("SELECT attempts FROM songs")]
    states = Counter(song["state"] for song in songs)
    return {
        "jobs": jobs,
        "workers": workers,
        "kills": restarts,
        "states": dict(states),
        "lost": jobs - len(reports),
        "of_their_own_seed": sum(
            song["report"]["seed"] // _SEEDS_APART == number
            for number, song in enumerate(songs)
            if song["report"]
        ),
        "made_again_after_done": sum(reports.get(song_id) != report for song_id, report in seen.items()),
        "begun_again_after_kill": sum(attempts) - jobs,
        "left_half_made": sum(1 for _ in data.glob("songs/*/work")),
        "accepted_all_after_seconds": round(accepted_seconds, 1),
        "seconds": round(seconds, 1),
        **_describe_memory(memory),
    }


def _describe_memory(memory: dict[int, int]) -> dict[str, float | None]:
    """Means of the second and the last quarter of what the last process made, in MB, and their ratio."""
    first, last = min(memory), max(memory)
    place = {done: (done - first) / max(1, last - first) for done in memory}
    second, fourth = (
        [memory[done] for done in memory if low <= place[done] <= low + 0.25] for low in (0.25, 0.75)
    )
    if not second:
        return {"memory_second_quarter_mb": None, "memory_last_quarter_mb": None, "memory_growth": None}
    before, after = float(np.mean(second)), float(np.mean(fourth))
    return {
        "memory_second_quarter_mb": round(before / 1e6, 1),
        "memory_last_quarter_mb": round(after / 1e6, 1),
        "memory_growth": round(after / before - 1, 4),
    }


def _find_reports(data: Path) -> dict[str, tuple[int, int]]:
    """What has been made so far: song -> what tells its report from one that were written again."""
    found = {path.parents[1].name: path.stat() for path in data.glob("songs/*/result/report.json")}
    return {song_id: (stat.st_ino, stat.st_mtime_ns) for song_id, stat in found.items()}


def _make_form(fields: dict[str, str], vocal: bytes) -> tuple[bytes, dict[str, str]]:
    """Body and headers of a form with a recording."""
    boundary = secrets.token_hex(16)
    parts = [f'name="{name}"\r\n\r\n{value}'.encode() for name, value in fields.items()]
    parts.append(b'name="vocal"; filename="song.wav"\r\nContent-Type: audio/wav\r\n\r\n' + vocal)
    between = f"--{boundary}\r\nContent-Disposition: form-data; ".encode()
    body = b"".join(between + part + b"\r\n" for part in parts) + f"--{boundary}--\r\n".encode()
    return body, {"Content-Type": f"multipart/form-data; boundary={boundary}"}


def _read_vocal(path: Path | None, seconds: float) -> bytes:
    """A WAV of the beginning of a recording; of a scale of tones, where there is none."""
    import soundfile

    from duotok.tokenizer.common.audio import read_audio

    if path is not None:
        wave = read_audio(path, seconds=seconds).numpy().T
    else:
        times = np.arange(round(seconds * _RATE_HZ)) / _RATE_HZ
        pitches = 60 + np.array([0, 2, 4, 5, 7])[(times * 2).astype(int) % 5]
        frequencies = 440 * 2 ** ((pitches - 69) / 12)
        harmonics = np.arange(1, 5)[:, None]
        wave = 0.1 * (np.sin(2 * np.pi * harmonics * frequencies * times) / harmonics).sum(axis=0)
    file = io.BytesIO()
    soundfile.write(file, wave, _RATE_HZ, "PCM_16", format="WAV")
    return file.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    parser = argparse.ArgumentParser(prog="load", description="Load test of `serve`; prints figures as JSON.")
    parser.add_argument("--jobs", type=int, default=100, metavar="N", help="songs at once (default: 100)")
    parser.add_argument("--bundle", type=Path, metavar="DIR", help="default: the model in the package")
    parser.add_argument("--vocal", type=Path, metavar="FILE", help="default: a scale of tones")
    parser.add_argument("--seconds", type=float, default=2.0, help="of the vocal (default: 2)")
    parser.add_argument("--kills", type=int, default=2, metavar="N", help="default: 2")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="songs made at once (default: 1)")
    parser.add_argument(
        "--batch", action="store_true", help="measure the memory of `batch` over --jobs songs"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="where the figures go as well")
    return guard(lambda: _measure(parser.parse_args(argv)))


def _measure(arguments: argparse.Namespace) -> None:
    vocal = _read_vocal(arguments.vocal, arguments.seconds)
    with tempfile.TemporaryDirectory() as folder:
        common = {"jobs": arguments.jobs, "bundle": arguments.bundle}
        if arguments.batch:
            figures = measure_batch(Path(folder), vocal, **common)
        else:
            figures = measure_load(
                Path(folder), vocal, **common, kills=arguments.kills, workers=arguments.workers
            )
    print(json.dumps(figures, indent=2))
    if arguments.out is not None:
        write_json(arguments.out, figures)
    if arguments.batch:
        if figures["memory_growth"] is None:
            raise LoadError("too few songs to tell whether the memory grows; give more --jobs")
        if figures["memory_growth"] > _MOST_GROWTH:
            raise LoadError(f"the memory of batch grew by {figures['memory_growth']:.1%}; see the figures")
        return
    wrong = ("lost", "made_again_after_done", "left_half_made")
    if figures["states"] != {"done": arguments.jobs} or any(figures[name] for name in wrong):
        raise LoadError("songs were lost or made twice; see the figures")


if __name__ == "__main__":
    sys.exit(main())
