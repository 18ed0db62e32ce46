"""Workers: what comes out is the same, in order, by processes and on a cluster that loses parts of itself."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from socketserver import BaseRequestHandler, TCPServer

import pytest
import torch
from safetensors.torch import load_file

from duotok.lm.dual_track.layout import TRACKS
from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.lm import tokenize
from duotok.recipes.lm.tokens import TokenShards, read_index
from duotok.recipes.workers import node_hours, ray_pool
from duotok.recipes.workers.pool import Workers
from duotok.recipes.workers.processes import DIED
from duotok.tokenizer.common.errors import ConfigError

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402


class KillsItsReader:
    """A task whose arrival ends the process, as a crashing decoder does."""

    def __reduce__(self) -> tuple:
        return os._exit, (3,)


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """Two machines with a processor each, as Ray sees them."""
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the workers cannot import tests
    os.environ["RAY_worker_niceness"] = "0"  # on a busy machine workers that are nice never start
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def test_a_task_that_kills_its_process_does_not_stop_the_rest() -> None:
    tasks = ["1", "x", KillsItsReader(), "4", "5", "6"]
    results = dict(zip(range(6), Workers(count=2).run(tasks, int), strict=True))
    assert [results[k][0] for k in range(6)] == tasks
    assert [results[k][1] for k in (0, 3, 4, 5)] == [1, 4, 5, 6]
    assert "ValueError: invalid literal" in results[1][1] and results[2][1] == DIED


def test_the_same_on_a_cluster(cluster: Cluster) -> None:
    tasks = ["1", "x", KillsItsReader(), *map(str, range(40))]
    results = list(Workers(count=2, ray=cluster.address).run(tasks, int))
    assert [task for task, _ in results] == tasks
    assert [result for _, result in results[3:]] == list(range(40))
    assert "ValueError: invalid literal" in results[1][1] and results[2][1] == DIED


def test_two_hundred_items_outlive_a_killed_worker_and_a_lost_machine(cluster: Cluster) -> None:
    results = []
    for number, (task, result) in enumerate(Workers(count=2, ray=cluster.address).run(range(200), slow_pid)):
        results.append((task, result))
        if number == 20:
            os.kill(result, signal.SIGKILL)
        if number == 80:
            cluster.remove_node(next(iter(cluster.worker_nodes)))
            cluster.add_node(num_cpus=1)
    assert [task for task, _ in results] == list(range(200))
    pids = {result for _, result in results}
    assert all(isinstance(pid, int) for pid in pids) and len(pids) >= 2


def test_tokens_by_a_cluster_are_those_of_one_process(
    cluster: Cluster, tiny_corpus: Path, small_tokenizer_folder: Path, tmp_path: Path
) -> None:
    base = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(tiny_corpus / "train.jsonl")]
    for name, options in (("here", []), ("ray", ["--workers", "2", "--ray", cluster.address])):
        assert tokenize.main([*base, "--batch", "1", "--out", str(tmp_path / name), *options]) == 0
    names = sorted(path.name for path in (tmp_path / "here").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ray").iterdir())
    assert (tmp_path / "here/index.json").read_text() == (tmp_path / "ray/index.json").read_text()
    for path in (tmp_path / "here").glob("*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "ray" / path.name)
        assert all(torch.equal(one[track], two[track]) for track in one)
    assert len(read_manifest(tiny_corpus / "train.jsonl")) == 4


def test_a_killed_driver_s_command_given_again_makes_every_item_once(
    cluster: Cluster, tiny_corpus: Path, small_tokenizer_folder: Path, tmp_path: Path
) -> None:
    items = read_manifest(tiny_corpus / "train.jsonl")
    items = [replace(item, id=f"{item.id}-{turn}") for turn in range(8) for item in items]
    manifest = tmp_path / "many.jsonl"
    write_manifest(manifest, items)
    (tmp_path / "audio").symlink_to(tiny_corpus / "audio")
    base = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(manifest), "--batch", "1"]
    base += ["--items-per-shard", "1"]
    on_ray = [*base, "--workers", "2", "--ray", cluster.address, "--out", str(tmp_path / "ray")]
    driver = subprocess.Popen(
        [sys.executable, "-m", "duotok.recipes.lm.tokenize", *on_ray], stderr=subprocess.DEVNULL
    )
    while driver.poll() is None and len(read_made(tmp_path / "ray")) < 3:
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    assert 3 <= len(read_made(tmp_path / "ray")) < len(items)
    assert tokenize.main(on_ray) == 0
    made = read_made(tmp_path / "ray")
    assert sorted(made) == sorted(item.id for item in items) and len(set(made)) == len(made)
    assert tokenize.main([*base, "--out", str(tmp_path / "here")]) == 0
    one, two = (TokenShards(tmp_path / name) for name in ("here", "ray"))
    codes = [{song.id: shards.codes(song) for song in shards.index.songs} for shards in (one, two)]
    assert all(torch.equal(codes[0][name][t], codes[1][name][t]) for name in made for t in TRACKS)


def read_made(folder: Path) -> list[str]:
    """Ids of the items that a folder of token shards holds."""
    index = read_index(folder)
    return [] if index is None else [song.id for song in index.songs]


def test_a_plan_adds_up(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["--measured", "tokenize=50,80", "--storage", "tokenize=0.5", "--measured", "songs=2,4"]
    given += [
        "--nodes",
        "4",
        "--workers-per-node",
        "4",
        "--cost-per-node-hour",
        "2",
        "--cost-per-tb-month",
        "10",
    ]
    assert node_hours.main(given) == 0
    page = capsys.readouterr().out
    # A quarter of tokenizing is done one after the other: four workers are worth 4 / 1.75.
    assert "| tokenize | 50 x | 80 x | 25.0% | 114.3 x | 87.5 | 21.9 | 175.00 | 5.000 TB |" in page
    assert "| songs | 2 x | 4 x | 0.0% | 8 x | 1,250.0 | 312.5 | 2,500.00 | 0.000 TB |" in page
    assert "| **all** | | | | | 1,337.5 | 334.4 | 2,675.00 | 5.000 TB |" in page and "50.00 a month" in page


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (["--measured", "tokenize=5"], "--measured takes NAME=A,B with numbers"),
        (["--measured", "tokenize=5,4"], "two workers must do as much as one"),
        (["--measured", "tokenize=5,9", "--storage", "songs=1"], "--storage songs: no such stage"),
        (["--measured", "tokenize=5,9", "--nodes", "0"], "--nodes must be above 0, got 0"),
    ],
)
def test_bad_plans(given: list[str], reason: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert node_hours.main(given) == 1
    told = capsys.readouterr().err
    assert reason in told and told.count("\n") == 1


def test_a_worker_that_cannot_start_is_one_line(cluster: Cluster) -> None:
    workers = Workers(count=1, ray=cluster.address)
    with pytest.raises(Exception, match="cannot start: .*no-such") as caught:
        list(workers.run([1], int, start=os.listdir, arguments=("/no-such",)))
    assert "\n" not in str(caught.value)


class Refusal(BaseRequestHandler):
    """What a web server answers who does not speak HTTP."""

    def handle(self) -> None:
        self.request.recv(1000)
        self.request.sendall(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("listener", "told"),
    [("nobody", "refused"), ("silent", "timed out"), ("web", "something else listens there")],
)
def test_where_no_cluster_is(listener: str, told: str, scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.shutdown()
    with TCPServer(("127.0.0.1", 0), Refusal) as server:  # a silent one accepts, and that is all
        address = f"{scheme}127.0.0.1:{server.server_address[1] if listener != 'nobody' else 1}"
        if listener == "silent":
            monkeypatch.setattr(ray_pool, "_KNOCK_SECONDS", 0.2)
        if listener == "web":
            threading.Thread(target=server.handle_request, daemon=True).start()
        with pytest.raises(
            ConfigError, match=f"no Ray of this version answers at {address}.*{told}"
        ) as caught:
            list(Workers(ray=address).run([1], int))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"count": 0}, "--workers must be at least 1"),
        ({"gpus": -1.0, "ray": "auto"}, "must not be negative"),
        ({"gpus": 0.5}, "belongs to --ray"),
    ],
)
def test_bad_workers(options: dict, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        Workers(**options)


def slow_pid(_: int) -> int:
    time.sleep(0.02)
    return os.getpid()
