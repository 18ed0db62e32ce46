"""Shards from a server that drops, is silent, is busy or refuses: waited for, whole, in a bounded folder."""

import multiprocessing
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from duotok.recipes import batch
from duotok.recipes.corpus.manifest import Item, read_manifest
from duotok.recipes.corpus.shards import open_items, pack_items, read_shards
from duotok.recipes.workers import storage
from duotok.recipes.workers.storage import FileCache
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import WriteError

pytest.importorskip("aiohttp")


class Server(ThreadingHTTPServer):
    """Serves files, and does to the coming GETs what `faults` say."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.faults, self.asked = files, list[str](), Counter[str]()
        self.knows_ranges, self.released = True, threading.Event()

    def url(self, name: str) -> str:
        """The address of a file."""
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"


class _Answer(BaseHTTPRequestHandler):
    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:  # noqa: N802
        self._send(is_head=True)

    def do_GET(self) -> None:  # noqa: N802
        self.server.asked[self.path[1:]] += 1
        fault = self.server.faults.pop(0) if self.server.faults else ""
        if fault == "silent":
            self.server.released.wait()
        if fault.isdigit():
            self.send_error(int(fault))
        elif fault != "silent":
            self._send(is_cut_off=fault == "drop")

    def _send(self, *, is_head: bool = False, is_cut_off: bool = False) -> None:
        data = self.server.files.get(self.path[1:])
        if data is None:
            self.send_error(404)
            return
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if wanted and self.server.knows_ranges:
            data = data[int(wanted[1]) : int(wanted[2]) + 1]
        self.send_response(206 if wanted and self.server.knows_ranges else 200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if not is_head:
            self.wfile.write(data[: len(data) // 2] if is_cut_off else data)
        self.close_connection = is_cut_off

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def items(tiny_corpus: Path) -> list[Item]:
    """Four items."""
    return read_manifest(tiny_corpus / "train.jsonl")


@pytest.fixture(scope="module")
def files(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Each item in a tar of its own."""
    tars = pack_items(items, tmp_path_factory.mktemp("tars"), megabytes=1)
    return {tar.name: tar.read_bytes() for tar in tars}


@pytest.fixture
def server(files: dict[str, bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server that runs, and readers of little patience."""
    monkeypatch.setattr(storage, "FIRST_PAUSE_SECONDS", 0.01)
    monkeypatch.setattr(storage, "BLOCK_BYTES", 500_000)
    server = Server(dict(files))
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield server
    server.released.set()
    server.shutdown()
    server.server_close()


NAME = "train-000000.tar"


@pytest.mark.parametrize(
    ("fault", "told"), [("503", "503"), ("429", "429"), ("drop", "Payload"), ("silent", "Timeout")]
)
def test_a_server_in_trouble_is_waited_for_and_said_once(
    fault, told, server, files, tmp_path, capfd, monkeypatch
):
    if fault == "silent":
        monkeypatch.setattr(storage, "SILENCE_SECONDS", 0.3)
    server.faults = ["", fault, fault, "", fault]
    with FileCache(tmp_path / "cache", 10**9).open(server.url(NAME)) as file:
        assert file.read() == files[NAME]
    lines = capfd.readouterr().err.splitlines()
    assert (
        len(lines) == 1 and server.url(NAME) in lines[0] and told in lines[0] and "asking again" in lines[0]
    )
    assert not server.faults and server.asked[NAME] >= 5


def test_items_are_those_of_the_tars_and_fetched_once(server, items, tmp_path):
    cache = FileCache(tmp_path, 10**9)
    server.knows_ranges = False  # the whole file comes, whatever was asked for
    for _ in range(2):
        again = list(read_shards(server.url("train-{000000..000003}.tar"), cache))
        assert [item.id for item in again] == [item.id for item in items]
        assert (again[2].read("bass", channels=1) - items[2].read("bass", channels=1)).abs().max() < 2e-5
    assert set(server.asked.values()) == {1} and len(server.asked) == 4


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("403", "may not be used"),
        ("401", "may not be used"),
        ("404", "is not there"),
        ("410", "cannot be read or written"),
    ],
)
def test_a_refusal_is_one_line_at_once(fault, told, server, tmp_path):
    server.faults = [fault]
    with pytest.raises(DataError, match=told) as caught:
        FileCache(tmp_path, 10**9).open(server.url(NAME))
    assert "\n" not in str(caught.value) and server.url(NAME) in str(caught.value)
    assert not [path for path in tmp_path.iterdir() if path.suffix != ".lock"]


def test_patience_ends(server, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(storage, "PATIENCE_SECONDS", 0.0)
    server.faults = ["503"] * 9
    with pytest.raises(DataError, match="503"):
        FileCache(tmp_path, 10**9).open(server.url(NAME))


def test_the_cache_keeps_within_its_size_what_was_used_last(server, files, tmp_path):
    names = sorted(files)
    two = len(files[names[0]]) + len(files[names[1]])
    cache = FileCache(tmp_path, two + len(files[names[2]]) // 2)
    dead = tmp_path / f".{cache._path('x').name}.1.part"  # what a killed process has left
    dead.write_bytes(bytes(two))
    for name in (names[0], names[1], names[0], names[2], names[0]):
        cache.open(server.url(name)).close()
        held = [path for path in tmp_path.iterdir() if path.suffix != ".lock"]
        assert sum(path.stat().st_size for path in held) <= cache.most_bytes and dead not in held
    assert [server.asked[name] > 0 for name in names] == [True, True, True, False]
    counts = dict(server.asked)
    cache.open(server.url(names[0])).close()
    assert counts == server.asked
    cache.open(server.url(names[1])).close()  # had gone
    assert server.asked[names[1]] == 2 * counts[names[1]]
    with pytest.raises(DataError, match=r"raise data\.cache_gb"):
        FileCache(tmp_path, 1000).open(server.url(names[3]))


@pytest.mark.parametrize("kept", [0, 1000, 700_000])
def test_a_file_that_was_cut_off_here_is_fetched_anew(kept, server, files, items, tmp_path):
    cache = FileCache(tmp_path, 10**9)
    cache.open(server.url(NAME)).close()
    (path,) = [path for path in tmp_path.iterdir() if path.suffix == ".tar"]
    path.write_bytes(files[NAME][:kept])
    (item,) = read_shards(server.url(NAME), cache)
    assert item.id == items[0].id and path.read_bytes() == files[NAME]
    server.files[NAME] = files[NAME][:kept]  # there as well
    path.unlink()
    with pytest.raises(DataError, match=NAME):
        list(read_shards(server.url(NAME), cache))


def _read(url: str, folder: Path, expected: bytes, begin, results) -> None:
    begin.wait()
    with FileCache(folder, 10**9).open(url) as file:
        results.put(file.read() == expected)


def test_processes_that_want_the_same_fetch_it_once(server, files, tmp_path):
    context = multiprocessing.get_context("fork")
    begin, results = context.Event(), context.Queue()
    arguments = (server.url(NAME), tmp_path, files[NAME], begin, results)
    processes = [context.Process(target=_read, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    server.faults = ["", "drop"]
    begin.set()
    assert [results.get(timeout=60) for _ in processes] == [True] * 3
    for process in processes:
        process.join()
    blocks = -(-len(files[NAME]) // 500_000)
    assert server.asked[NAME] == blocks + 1  # for the one that broke off


def test_what_a_killed_process_had_begun_is_fetched_by_the_next(server, files, tmp_path):
    context = multiprocessing.get_context("fork")
    begin, results = context.Event(), context.Queue()
    server.faults = ["", "silent"]
    begin.set()
    arguments = (server.url(NAME), tmp_path, files[NAME], begin, results)
    process = context.Process(target=_read, args=arguments)
    process.start()
    while server.faults:  # until it waits for its second block
        process.join(0.05)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL and [*tmp_path.glob(".*.part")]
    with FileCache(tmp_path, len(files[NAME])).open(server.url(NAME)) as file:  # no room for both
        assert file.read() == files[NAME]


def test_a_folder_that_cannot_be_written_is_one_line(server, tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(WriteError, match="cannot write"):
        FileCache(tmp_path / "file" / "cache", 10**9).open(server.url(NAME))


def test_draws_of_remote_tars_are_those_of_local_ones(server, files, tmp_path):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    settings = {"shortest_seconds": 1.0, "tars": 2, "steps_per_tar": 1}
    settings |= {"cache": tmp_path / "cache", "cache_gb": 3 * len(files[NAME]) / 1e9}
    names = "train-{000000..000003}.tar"
    sources = [open_items(place, **settings) for place in (f"{tmp_path}/{names}", server.url(names))]
    for step in range(8):
        drawn = []
        for source in sources:
            source.seek(1, 0, step)
            drawn.append(source.pick(np.random.default_rng(step), is_sung=False))
        assert drawn[0].id == drawn[1].id
        assert (drawn[0].read("bass") == drawn[1].read("bass")).all()


def test_many_songs_from_where_one_may_not_read_or_write(server, tmp_path, capsys):
    server.files["songs.jsonl"] = b'{"vocal": "a.wav"}'
    assert batch.main(["--songs", server.url("songs.jsonl"), "--out", server.url("results")]) == 1
    told = capsys.readouterr().err
    assert told.startswith(f"error: {server.url('results')} cannot be read or written: ") and "501" in told
    server.faults = ["403"] * 9
    assert batch.main(["--songs", server.url("songs.jsonl"), "--out", str(tmp_path)]) == 1
    told += capsys.readouterr().err
    assert "songs.jsonl may not be used: " in told and told.count("\n") == 2
