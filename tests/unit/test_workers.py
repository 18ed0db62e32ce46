"""Workers: what comes out is the same, in order, by processes and on a cluster that loses parts of itself."""

import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.lm import tokenize
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
    assert all(isinstance(pid, int) for pid in pids) and len(pids) >= 3


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


def test_a_worker_that_cannot_start_is_one_line(cluster: Cluster) -> None:
    workers = Workers(count=1, ray=cluster.address)
    with pytest.raises(Exception, match="cannot start: .*no-such") as caught:
        list(workers.run([1], int, start=os.listdir, arguments=("/no-such",)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1"])
def test_where_no_cluster_is(address: str) -> None:
    ray.shutdown()
    with pytest.raises(ConfigError, match=f"no Ray of this version answers at {address}") as caught:
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
