"""What the command lines share: errors in one line, progress messages, the memory a command took."""

import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import DuoTokError

# Packages that only some commands need, by the name they are imported by, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("librosa", "matplotlib", "mir_eval", "sklearn"), "evaluation"),
    **dict.fromkeys(("pesq", "pystoi"), "quality"),
    **dict.fromkeys(("mido", "pyworld", "onnx", "onnxruntime"), "corpus"),
    "webdataset": "songs",
    "peft": "lora",
    **dict.fromkeys(("accelerate", "deepspeed", "tensorboard"), "train"),
}


def guard(run: Callable[[], None], *, interrupted: str = "run the same command again to go on") -> int:
    """Run a command's work; return its exit code: 0, 1 (one line on stderr), 130 (interrupted)."""
    try:
        run()
    except DuoTokError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        print(f"error: {error.name} is missing; in the checkout: pip install '.[{extra}]'", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def show_progress_messages() -> None:
    """Let the first process tell on stderr what the library logs: kernels chosen, code being compiled."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("duotok").setLevel(logging.INFO)


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes."""
    status = Path("/proc/self/status")
    if status.is_file():
        # Not getrusage: a started process inherits its parent's peak there (Linux, exec_mmap).
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
