"""serve: the accompanist as a service, a REST interface and a page.

Run: serve [--host 127.0.0.1] [--port 7860] [--data DIR]
     python -m duotok.recipes.service.serve
"""

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from duotok.recipes.accompany.request import DEVICES
from duotok.tokenizer.common.command import add_completion, guard, parse_arguments
from duotok.tokenizer.common.errors import ConfigError

_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="serve",
        description="Plays the band for whoever sends a singer: a page and a REST interface "
        "(POST /songs, /openapi.json), one model in memory.",
    )
    add_completion(parser)
    add = parser.add_argument_group("where it is found").add_argument
    add("--host", default="127.0.0.1", help="address to listen at (default: 127.0.0.1, this machine only)")
    add("--port", type=int, default=7860, help="default: 7860; 0 takes a free one")
    add("--token", help="what clients must send (default: that in DUOTOK_TOKEN, or none)")
    add("--open", action="store_true", help="let everybody in who reaches a --host, without a token")
    add = parser.add_argument_group("what is kept").add_argument
    text = "folder of the songs, made where missing (default: duotok-songs)"
    add("--data", type=Path, default=Path("duotok-songs"), metavar="DIR", help=text)
    text = "delete songs, done or not to be done, after D days (default: 7)"
    add("--keep-days", type=float, default=7.0, metavar="D", help=text)
    add = parser.add_argument_group("what is taken").add_argument
    add("--most-seconds", type=float, default=600.0, metavar="S", help="of a recording (default: 600)")
    add("--most-megabytes", type=float, default=200.0, metavar="M", help="of an upload (default: 200)")
    add("--most-queued", type=int, default=100, metavar="N", help="songs that may wait (default: 100)")
    add = parser.add_argument_group("where it is computed").add_argument
    add("--workers", type=int, default=1, metavar="N", help="songs that are made at once (default: 1)")
    text = "folder of a model, or owner/name[@revision] on the hub (default: the model in the package)"
    add("--model", metavar="MODEL", help=text)
    add("--device", default="auto", choices=DEVICES, help="default: auto")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return the exit code: 0, 1 (one line on stderr), 2 (usage), 130 (interrupted)."""
    arguments = parse_arguments(build_parser(), argv)
    return guard(lambda: _serve(arguments), interrupted="songs that were begun go on with the next start")


def _serve(arguments: argparse.Namespace) -> None:
    token = arguments.token or os.environ.get("DUOTOK_TOKEN") or None
    is_loopback = _check(arguments, token)
    import uvicorn

    from duotok.recipes.service.queue import SongQueue

    # Cheap checks first: the options, the folder; then the model.
    with closing(SongQueue(arguments.data, bound=arguments.most_queued)) as queue:
        from duotok.recipes.accompany.pipeline import Accompanist
        from duotok.recipes.service.api import Limits, create_app
        from duotok.recipes.service.song_page import mount_page

        app = create_app(
            queue,
            Accompanist.from_pretrained(arguments.model, device=arguments.device),
            workers=arguments.workers,
            limits=Limits(
                seconds=arguments.most_seconds,
                megabytes=arguments.most_megabytes,
                keep_days=arguments.keep_days,
            ),
            token=token,
            hosts=_LOOPBACK if is_loopback and token is None else None,
        )
        config = uvicorn.Config(
            mount_page(app, queue),
            host=arguments.host,
            port=arguments.port,
            log_level="warning",
            timeout_graceful_shutdown=5,
            server_header=False,
        )
        socket = config.bind_socket()
        socket.listen()  # who comes before all is ready waits
        host, port = socket.getsockname()[:2]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        print(f"{url}: songs are in {arguments.data}", flush=True)
        uvicorn.Server(config).run(sockets=[socket])


def _check(arguments: argparse.Namespace, token: str | None) -> bool:
    """Raise ConfigError for options that cannot be; whether only this machine reaches the service."""
    for name in ("keep_days", "most_seconds", "most_megabytes", "most_queued", "workers"):
        if not getattr(arguments, name) > 0:
            raise ConfigError(f"--{name.replace('_', '-')} must be above 0, got {getattr(arguments, name)}")
    if not 0 <= arguments.port < 65_536:
        raise ConfigError(f"--port must be from 0 to 65535, got {arguments.port}")
    try:
        is_loopback = arguments.host == "localhost" or ipaddress.ip_address(arguments.host).is_loopback
    except ValueError:
        is_loopback = False
    if not is_loopback and token is None and not arguments.open:
        raise ConfigError(
            f"at {arguments.host} others reach this service: give a --token that they must send, or --open"
        )
    return is_loopback


if __name__ == "__main__":
    sys.exit(main())
