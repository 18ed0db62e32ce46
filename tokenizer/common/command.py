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


def show_progress_messages() -> None:
    """Let the first process tell on stderr what the library logs: kernels chosen, code being compiled."""
    logging.basicConfig(format="%(message)s")
    if os.environ.get("RANK", "0") == "0":
        logging.getLogger("duotok").setLevel(logging.INFO)


def parse_arguments(parser: argparse.ArgumentParser, argv: Sequence[str] | None) -> argparse.Namespace:
    """What the parser makes of arguments (None: those of the process), file names such as "-song.wav" too.

    Argparse takes such a name for an option. So what follows an option of one value, begins with a single
    dash and is no option itself is joined to it: "--vocal=-song.wav".
    """
    options = {option: action for action in parser._actions for option in action.option_strings}
    joined: list[str] = []
    for argument in sys.argv[1:] if argv is None else argv:
        before = options.get(joined[-1]) if joined else None
        is_dashed = argument.startswith("-") and not argument.startswith("--") and argument not in options
        if is_dashed and before is not None and before.nargs is None:
            joined[-1] += f"={argument}"
        else:
            joined.append(argument)
    return parser.parse_args(joined)
