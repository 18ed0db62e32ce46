"""Damaged recordings: whatever is flipped or cut off in one, loading ends in sound or in one line, in bounds.

Run: python -m duotok.recipes.evaluation.fuzz --files 10000 [--seed 1] [--first 0] [--out fuzz.json]
Files are loaded by a process beside, which their faults may end; file N of a seed is damaged in the same
places in every run.
"""

import argparse
import os
import signal
import struct
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

if TYPE_CHECKING:
    from duotok.recipes.accompany.mix import Vocal

KINDS = ("wav", "flac", "ogg", "mp3", "m4a", "webm", "wma")
LONGEST_SECONDS, LARGEST_BYTES = 10, 1_000_000_000
_LONGEST_WAIT_SECONDS = 120  # on a machine that has others to serve; computing counts
_ROOM_BYTES = 4_000_000_000  # where a process is stopped, long after it has been found too large
_CODECS = {"m4a": "aac", "mp4": "aac", "mov": "aac", "webm": "libopus", "wma": "wmav2", "aac": "aac"}
_OUTCOMES = ("sound", "refused", "crash", "memory")
_HELD = struct.Struct("<Q")  # bytes that a process begins with
_RESULT = struct.Struct("<Bd")  # number of an outcome, seconds
_TOGETHER = 50  # files that a process loads


def make_recording(path: Path, wave: np.ndarray, rate_hz: int, **options: str) -> None:
    """Write wave [channels, samples] as what the name ends in; options: of FFmpeg's muxer."""
    codec = _CODECS.get(path.suffix[1:])
    if codec is None:
        import soundfile

        soundfile.write(path, wave.T, rate_hz)
        return
    import av

    # Without what is drawn by chance, such as the names of tracks.
    with av.open(str(path), "w", options={"fflags": "+bitexact", **options}) as container:
        layout = "mono" if len(wave) == 1 else "stereo"
        stream: Any = container.add_stream(codec, rate=rate_hz, layout=layout, bit_rate=96_000)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(wave, np.float32), "fltp", layout)
        frame.sample_rate, frame.pts = rate_hz, 0
        for part in (frame, None):
            container.mux(stream.encode(part))


def damage(whole: bytes, kind: str, generator: np.random.Generator) -> bytes:
    """Flip one to seven bits, half of the time in the head, and cut off the end of every fourth file.

    An OGG's checksums are made right again.
    """
    data = bytearray(whole)
    if generator.random() < 0.25:
        del data[int(generator.integers(1, len(data))) :]
    reach = min(len(data), 128 if generator.random() < 0.5 else len(data))
    for place in generator.integers(reach, size=generator.integers(1, 8)):
        data[place] ^= 1 << int(generator.integers(8))
    return _with_checksums(data) if kind == "ogg" else bytes(data)


def try_loading(
    paths: Sequence[Path], load: Callable[[Path], "Vocal"] | None = None
) -> list[tuple[str, float, int]]:
    """Load vocals in a process beside this; return how each ended, its seconds of computing, bytes at most.

    The bytes are those beyond what the process begins with.
    What comes after one that ends the process has another; where there was too much memory, each has its own.
    load: None takes that of the accompanist.
    """
    import torch

    from duotok.recipes.accompany.mix import load_vocal

    receiver, sender = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the threads of the parent are not here
        _load_all(paths, load or load_vocal, sender)
    os.close(sender)
    with open(receiver, "rb") as file:
        (held,), told = _HELD.unpack(file.read(_HELD.size)), list(_RESULT.iter_unpack(file.read()))
    _, status, usage = os.wait4(child, 0)
    size = max(0, usage.ru_maxrss * 1024 - held)
    if size > LARGEST_BYTES and len(paths) > 1:
        return [try_loading([path], load)[0] for path in paths]
    found = [(_OUTCOMES[code], seconds, size) for code, seconds in told]
    if len(found) < len(paths) and os.waitstatus_to_exitcode(status) < 0:
        is_slow = os.waitstatus_to_exitcode(status) in (-signal.SIGALRM, -signal.SIGPROF)
        found.append(("hang" if is_slow else "crash", float(LONGEST_SECONDS), size))
    if size > LARGEST_BYTES:
        found = [("memory", seconds, size) for _, seconds, size in found]
    return [*found, *(try_loading(paths[len(found) :], load) if len(found) < len(paths) else [])]


def _load_all(paths: Sequence[Path], load: Callable[[Path], "Vocal"], sender: int) -> NoReturn:
    """Load vocals one after another, tell how each ended, and leave; after a fault at once."""
    import resource

    from duotok.tokenizer.common.errors import AudioError

    try:
        os.write(sender, _HELD.pack(_pages(1)))
        room = _pages(0) + _ROOM_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (room, room))
        for number in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        for path in paths:
            signal.alarm(_LONGEST_WAIT_SECONDS)
            signal.setitimer(signal.ITIMER_PROF, LONGEST_SECONDS)
            code, began = 2, time.process_time()
            try:
                code = 0 if bool(load(path).wave.isfinite().all()) else 2
            except AudioError as error:
                code = 1 if str(error).isprintable() else 2
            except MemoryError:
                code = 3
            finally:
                os.write(sender, _RESULT.pack(code, time.process_time() - began))
            if code > 1:
                break
    finally:
        os._exit(0)


def _pages(which: int) -> int:
    """Bytes of this process: 0 of its addresses, 1 of what of them is in memory."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[which]) * os.sysconf("SC_PAGE_SIZE")


def fuzz(files: int, seed: int, first: int = 0) -> dict[str, Any]:
    """Damage and load so many files, of all kinds in turn; return what became of them."""
    from tqdm import tqdm

    found = {kind: Counter() for kind in KINDS}
    faults, longest, largest = [], 0.0, 0
    wave = 0.1 * np.random.default_rng(seed).standard_normal((2, 3 * 16_000))
    with tempfile.TemporaryDirectory() as folder:
        wholes = {kind: Path(folder) / f"whole.{kind}" for kind in KINDS}
        for path in wholes.values():
            make_recording(path, wave, 16_000)
        numbers = range(first, first + files)
        for start in tqdm(numbers[::_TOGETHER], unit_scale=_TOGETHER, unit="file", disable=None):
            paths = []
            for number in numbers[start - first :][:_TOGETHER]:
                kind = KINDS[number % len(KINDS)]
                paths.append(Path(folder) / f"damaged-{number % _TOGETHER}.{kind}")
                generator = np.random.default_rng([seed, number])
                paths[-1].write_bytes(damage(wholes[kind].read_bytes(), kind, generator))
            for number, path, (outcome, seconds, size) in zip(
                numbers[start - first :], paths, try_loading(paths), strict=False
            ):
                found[path.suffix[1:]][outcome] += 1
                faults += [] if outcome in ("sound", "refused") else [{"file": number, "fault": outcome}]
                longest, largest = max(longest, seconds), max(largest, size)
    return {
        "files": files,
        "seed": seed,
        "faults": faults,
        "longest_seconds": round(longest, 2),
        "largest_megabytes": round(largest / 1e6),
        "kinds": {kind: dict(counts) for kind, counts in found.items()},
    }


def _with_checksums(data: bytearray) -> bytes:
    """An OGG file whose pages are taken for whole again."""
    pages = data.split(b"OggS")
    for number, page in enumerate(pages):
        if len(page) > 22:
            page[18:22] = bytes(4)
            total = 0
            for byte in b"OggS" + page:
                total = (total << 8 & 0xFFFFFFFF) ^ _TABLE[total >> 24 ^ byte]
            pages[number][18:22] = total.to_bytes(4, "little")
    return b"OggS".join(pages)


def _remainder(value: int) -> int:
    for _ in range(8):
        value = value << 1 ^ (0x104C11DB7 if value >> 31 else 0)
    return value


_TABLE = [_remainder(byte << 24) for byte in range(256)]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, or 1 where a file was not loaded as it should be."""
    parser = argparse.ArgumentParser(
        prog="python -m duotok.recipes.evaluation.fuzz", description="Loads damaged recordings."
    )
    parser.add_argument("--files", type=int, default=10_000, help="how many (default: 10000)")
    parser.add_argument("--seed", type=int, default=1, help="of the damage (default: 1)")
    parser.add_argument("--first", type=int, default=0, help="number of the first file (default: 0)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON for the result (default: printed)")
    arguments = parser.parse_args(argv)
    from duotok.tokenizer.common.files import write_json

    result = fuzz(arguments.files, arguments.seed, arguments.first)
    if arguments.out is not None:
        write_json(arguments.out, result)
    print(result)
    return 1 if result["faults"] else 0


if __name__ == "__main__":
    sys.exit(main())
