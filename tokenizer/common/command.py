"""What the command lines share: errors in one line, and progress messages."""

import argparse
import logging
import os
import sys
from collections.abc import Callable, Sequence

from .errors import DuoTokError

# Packages that only some commands need, by the name they are imported by, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("librosa", "matplotlib", "mir_eval", "sklearn"), "evaluation"),
    **dict.fromkeys(("pesq", "pystoi"), "quality"),
    **dict.fromkeys(("mido", "pyworld", "onnx", "onnxruntime"), "corpus"),
    "webdataset": "songs",
    "peft": "lora",
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
        print(f'error: {error.name} is missing; pip install "duotok[{extra}]"', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"interrupted: {interrupted}", file=sys.stderr)
        return 130
    return 0


def join_dashed_values(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> list[str]:
    """The arguments with "--vocal -song.wav" as "--vocal=-song.wav", which argparse takes for a value.

    Joined is what follows an option that takes one value, begins with a single dash and is no option itself.
    """
    options = {option: action for action in parser._actions for option in action.option_strings}
    joined: list[str] = []
    for argument in arguments:
        before = options.get(joined[-1]) if joined else None
        takes_value = before is not None and before.nargs is None
        dashed = argument.startswith("-") and not argument.startswith("--") and argument not in options
        if takes_value and dashed and argument != "-":
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return joined


def show_progress_messages() -> None:
    """Let the first process tell on stderr what the library logs: kernels chosen, code being compiled."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("duotok").setLevel(logging.INFO)
