"""Time and peak memory of making one accompaniment, in a process of its own on two CPU cores.

Run: python -m duotok.recipes.evaluation.speed --vocal song.wav --bundle DIR
Prints one line of JSON: seconds of audio, of loading the bundle and of computing, the peak memory, and with
--first-sound the seconds from the start of `generate --stream` to its first sound.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from duotok.tokenizer.common.command import peak_memory_gb
from duotok.tokenizer.common.errors import DuoTokError

CORES = 2
_LONGEST_WAIT_SECONDS = 3_600


def time_in_subprocess(vocal: Path, bundle: Path, *, first_sound: bool = False) -> dict[str, float]:
    """What this module prints for a recording; raises DuoTokError with its last line when it fails."""
    command = [sys.executable, "-m", "duotok.recipes.evaluation.speed", "--vocal", str(vocal)]
    command += ["--bundle", str(bundle), *(["--first-sound"] if first_sound else [])]
    environment = {**os.environ, "OMP_NUM_THREADS": str(CORES), "CUDA_VISIBLE_DEVICES": ""}
    try:
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_LONGEST_WAIT_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise DuoTokError(
            f"timing {vocal} took over {_LONGEST_WAIT_SECONDS} s; use a smaller model"
        ) from error
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise DuoTokError(f"timing {vocal} failed: {reason}")
    return json.loads(done.stdout.strip().splitlines()[-1])


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Compute with at most that many threads, and on no more cores where the system can be told."""
    import torch

    threads = torch.get_num_threads()
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_setaffinity") else None
    if cores is not None:
        os.sched_setaffinity(0, sorted(cores)[:count])
    torch.set_num_threads(min(threads, count))
    try:
        yield
    finally:
        torch.set_num_threads(threads)
        if cores is not None:
            os.sched_setaffinity(0, cores)


def time_first_sound(vocal: Path, bundle: Path) -> float:
    """Seconds from the start of `generate --stream -`, a process of its own, to the first sound it gives."""
    from duotok.recipes.accompany.stream import HEADER_BYTES

    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "duotok.recipes.accompany.generate", "--vocal", str(vocal)]
        command += ["--model", str(bundle), "--stream", "-", "--out", f"{folder}/song"]
        started = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            heard = process.stdout.read(HEADER_BYTES + 1)
            seconds = time.perf_counter() - started
            process.kill()
            said = process.stderr.read().decode(errors="replace").strip()
    if len(heard) <= HEADER_BYTES:
        raise DuoTokError(said or f"generate gave no sound of {vocal}")
    return seconds


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Time one accompaniment on two CPU cores.")
    parser.add_argument("--vocal", type=Path, required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--first-sound", action="store_true", help="time the first sound of a stream, too")
    arguments = parser.parse_args(argv)
    from duotok.recipes.accompany.pipeline import Accompanist
    from duotok.tokenizer.common.audio import audio_seconds

    try:
        with on_cores(CORES), tempfile.TemporaryDirectory() as folder:
            started = time.perf_counter()
            accompanist = Accompanist.from_pretrained(arguments.bundle)
            loaded = time.perf_counter()
            accompanist.accompany(arguments.vocal, seed=0).save(Path(folder) / "song")
            finished = time.perf_counter()
            heard = {}
            if arguments.first_sound:
                heard["first_sound_seconds"] = time_first_sound(arguments.vocal, arguments.bundle)
        seconds = audio_seconds(arguments.vocal)
    except DuoTokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    figures = {
        "audio_seconds": seconds,
        "load_seconds": loaded - started,
        "compute_seconds": finished - loaded,
        "peak_memory_gb": peak_memory_gb(),
        **heard,
    }
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    sys.exit(main())
