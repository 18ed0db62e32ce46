"""What the command lines share: errors in one line, progress messages, the memory a command took."""

import argparse
import io
import logging
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import DuoTokError
from .files import failure_reason, printable

# Packages that only some commands need, by the name they are imported by, and the extra that brings them.
EXTRAS = {
    **dict.fromkeys(("librosa", "matplotlib", "mir_eval", "sklearn"), "evaluation"),
    **dict.fromkeys(("pesq", "pystoi"), "quality"),
    "music21": "score",
    **dict.fromkeys(("mido", "pyworld", "onnx", "onnxruntime"), "corpus"),
    "shtab": "completion",
    **dict.fromkeys(("fastapi", "gradio", "multipart", "python_multipart", "uvicorn"), "serve"),
    "peft": "lora",
    **dict.fromkeys(("accelerate", "deepspeed", "tensorboard"), "train"),
}


class Terminated(KeyboardInterrupt):
    """The process is told to end by SIGTERM or SIGHUP; raised so that every block cleans up behind itself."""


def guard(run: Callable[[], None], *, interrupted: str = "run the same command again to go on") -> int:
    """Run a command's work; return its exit code.

    0; 1 with one line on stderr; 130 where it was interrupted, 143 (129) where it was told to end by SIGTERM
    (SIGHUP). A reader of the output that goes away is no failure, an output that cannot be written is one.
    """
    # Read when torch is loaded: threads that spin while they wait take the core from whoever else needs it.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names that are no UTF-8, consoles of few letters
    try:
        with _told_to_end():
            run()
    except DuoTokError as error:
        return _fail(str(error))
    except ModuleNotFoundError as error:
        extra = EXTRAS.get((error.name or "").partition(".")[0])
        if extra is None:
            raise
        return _fail(f"{error.name} is missing; in the checkout: pip install '.[{extra}]'")
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return _finish_output()
        where = f"{error.filename}: " if error.filename is not None else ""
        return _fail(f"{where}{failure_reason(error)}")
    except KeyboardInterrupt as error:
        _tell(f"interrupted: {interrupted}")
        return 128 + (error.args[0] if isinstance(error, Terminated) else signal.SIGINT)
    return _finish_output()


def _fail(message: str) -> int:
    _tell(f"error: {message}")
    return 1


def _tell(line: str) -> None:
    with suppress(OSError):  # where stderr cannot be written, the exit code has to do
        print(printable(line), file=sys.stderr, flush=True)


@contextmanager
def _told_to_end() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise Terminated within the block, unless they are taken or ignored already."""

    owner = os.getpid()

    def stop(number: int, _: object) -> None:
        if os.getpid() != owner:  # a forked worker has nothing to clean up
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        signal.signal(number, signal.SIG_IGN)  # `timeout` sends it twice: the cleaning up goes on
        raise Terminated(number)

    known = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    signals = [number for number in known if signal.getsignal(number) is signal.SIG_DFL]
    if threading.current_thread() is not threading.main_thread():
        signals = []  # only the main thread may
    for number in signals:
        signal.signal(number, stop)
    try:
        yield
    finally:
        for number in signals:
            signal.signal(number, signal.SIG_DFL)


def _reader_is_gone() -> bool:
    """Whether it is the standard output that nobody reads any more, and not a pipe to a worker."""
    if not hasattr(select, "poll"):
        return False
    poll = select.poll()
    poll.register(sys.stdout.fileno(), select.POLLOUT)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def _finish_output() -> int:
    """Write out what was printed; return the exit code."""
    if sys.stdout is None:
        return 0
    try:
        sys.stdout.flush()
        return 0
    except OSError as error:
        # What is left in the buffer goes nowhere, or Python would complain of it at its end.
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 0
        return _fail(f"cannot write the output: {failure_reason(error)}")


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


class _PrintCompletion(argparse.Action):
    """Prints what a shell completes a command by, and ends; the other options need not be there."""

    def __call__(
        self, parser: argparse.ArgumentParser, _: argparse.Namespace, shell: Any, option: str | None = None
    ) -> None:
        try:
            import shtab
        except ModuleNotFoundError:
            parser.exit(1, f"error: shtab is missing; in the checkout: pip install '.[{EXTRAS['shtab']}]'\n")
        parsers = [parser]
        for each in parsers:
            for action in each._actions:
                if isinstance(action, argparse._SubParsersAction):
                    parsers += action.choices.values()
                elif (known := _PATHS.get(str(action.metavar))) or action.type is Path:
                    action.complete = shtab.DIRECTORY if known == "folder" else shtab.FILE  # type: ignore[attr-defined]
        print(shtab.complete(parser, shell))
        parser.exit()


# What the words that stand for an option's value in --help are names of.
_PATHS = {"FILE": "file", "PATH": "file", "CSV": "file", "DIR": "folder", "MODEL": "folder"}


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Give a command the option --print-completion, whose output a shell completes it by (shtab)."""
    text = 'print what lets the shell complete this command, for: eval "$(%(prog)s --print-completion bash)"'
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=("bash", "zsh", "tcsh"),
        dest=argparse.SUPPRESS,
        default=argparse.SUPPRESS,  # no setting of the command
        help=text,
    )


def peak_memory_gb() -> float:
    """Largest resident memory of this process so far, in 10^9 bytes."""
    status = Path("/proc/self/status")
    # Not getrusage: a started process inherits its parent's peak there (Linux, exec_mmap).
    for line in status.read_text(encoding="ascii").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e9
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9
