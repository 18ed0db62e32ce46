"""The tiny language model under ZeRO 1, 2 and 3 in two CPU processes over gloo, started by torchrun.

A launch of each stage, by the recipe's command, is killed in the middle. One more takes those runs up again,
trains each stage whole and in pieces, and starts runs that must fail: a launch costs more than training a
tiny model.
DeepSpeed compiles its communication at the first start on a machine (about 25 s).
"""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.lm import train
from duotok.recipes.lm.tokens import TokenIndex, append_shard
from duotok.recipes.training.log import read_log
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.model import DuoTokenizer

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed's CPU communication is for Linux"),
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.skipif(
        shutil.which(os.environ.get("CXX", "c++")) is None,
        reason="DeepSpeed compiles its CPU communication, and there is no C++ compiler",
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="two processes on CPUs, and this machine has CUDA"),
]
RECIPES = Path(train.__file__).parent
TINY = str(RECIPES / "tiny.yaml")
STAGES = ("zero1", "zero2", "zero3")
STEPS, KILLED_AFTER = 7, 2
VALIDATE_EVERY = 3
EVERY_STEP = "train.checkpoint_minutes=0"
LAUNCH_SECONDS = 3600  # never reached on idle cores; bounds a hang
SIZES = {"vocal": 11, "accompaniment": 13}
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]

# Runs jobs one after the other in the same two processes. A job that fails leaves its error in a file.
DRIVER = """
import json, os, resource, shutil, sys
from pathlib import Path
import numpy as np
import torch
from accelerate.state import AcceleratorState
from duotok.recipes.lm import train
from duotok.recipes.training.loop import train_recipe
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import DuoTokError

rank = os.environ["RANK"]
for job in json.loads(Path(sys.argv[1]).read_text()):
    out = Path(job["out"])
    if job["copy"]:
        if rank == "0":
            shutil.copytree(job["copy"], out)
            state = json.loads((out / "checkpoint" / "state.json").read_text())
            (out / "checkpoint" / "state.json").write_text(json.dumps(state | job["state"]))
        torch.distributed.barrier()
    config = load_config(train.Config, job["recipe"], job["overrides"])

    def build(config):
        task = train.build(config)

        def validate(process, processes):
            nats = task.objective(**task.make_batch(np.random.default_rng(process)))["total"]
            return {"nats": (float(nats), 1)}

        task.validate = validate
        task.count_units = lambda batch: batch["segment"].numel()
        return task

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (job["file_bytes"] or soft, hard))
    error = None
    try:
        train_recipe(build, config, out, deepspeed=Path(job["deepspeed"]), stop_after=job["stop_after"])
    except DuoTokError as raised:
        error = raised
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if job["keep"] and rank == "0":
        shutil.copytree(out, job["keep"])
    if error is not None:
        (out / f"error{rank}.txt").write_text(str(error))
        if job["file_bytes"]:
            sys.exit(3)  # as a command would: the other process waits for this one
    AcceleratorState._reset_state()
"""


@pytest.fixture(scope="module")
def overrides(
    tmp_path_factory: pytest.TempPathFactory, make_small_tokenizer: Callable[..., DuoTokenizer]
) -> list[str]:
    """Settings of the tiny recipe: a tokenizer and a sheet reader with random weights, three random songs."""
    root = tmp_path_factory.mktemp("data")
    tokenizer = make_small_tokenizer(root / "tokenizer")
    index = TokenIndex(
        tokenizer_fingerprint=str(tokenizer.fingerprint), codebook_sizes=SIZES, frame_rate_hz=25.0
    )
    rng = np.random.default_rng(0)
    songs = {
        f"item{n}": (
            f"song{n}",
            "train",
            {track: torch.from_numpy(rng.integers(size, size=100)) for track, size in SIZES.items()},
        )
        for n in range(3)
    }
    append_shard(root / "tokens", index, songs)
    reader = SheetReader.for_tokenizer(tokenizer, SheetReaderConfig(dim=8, dilations=(1, 2)))
    reader.save_pretrained(root / "sheet")
    return [
        f"sheets.reader={root / 'sheet'}",
        f"tokenizer={root / 'tokenizer'}",
        f"data.tokens={root / 'tokens'}",
        f"train.steps={STEPS}",
        "train.log_every=1",
        "train.batch_size=4",
        "train.accumulate=2",
        "model.attention_dropout=0.1",
    ]


def zero(name: str) -> str:
    return name if name.endswith(".json") else str(RECIPES / "deepspeed" / f"{name}.json")


def environment() -> dict[str, str]:
    # Accelerate's switch for the CPU would have it drop DeepSpeed.
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def find_rank(launcher: int, rank: int) -> psutil.Process:
    for child in psutil.Process(launcher).children():
        if child.environ().get("RANK") == str(rank):
            return child
    raise AssertionError(f"no process of rank {rank}")


@pytest.fixture(scope="module")
def killed(overrides: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each stage, started by the command, one process of it killed; see kill_a_run."""
    root = tmp_path_factory.mktemp("killed")
    for stage in STAGES:
        kill_a_run(overrides, stage, root / stage)
    return root


def kill_a_run(overrides: list[str], stage: str, out: Path) -> None:
    """Start a run by the command and kill one of its processes; told.txt has what it said."""
    out.mkdir()
    deadline = time.monotonic() + LAUNCH_SECONDS
    command = [*COMMAND, "-m", "duotok.recipes.lm.train", TINY, "--out", str(out)]
    command += ["--deepspeed", zero(stage)]
    command += [part for override in (*overrides, EVERY_STEP) for part in ("--set", override)]
    log, told = out / "log.jsonl", out / "told.txt"
    with told.open("w", encoding="utf-8") as errors:  # not a pipe, which would fill and stop the run
        launcher = subprocess.Popen(command, env=environment(), stderr=errors)
    while not log.exists() or len(log.read_text().splitlines()) < KILLED_AFTER:
        assert launcher.poll() is None and time.monotonic() < deadline, told.read_text()[-4000:]
        time.sleep(0.02)
    survivor = find_rank(launcher.pid, 0)
    find_rank(launcher.pid, 1).send_signal(signal.SIGKILL)
    assert launcher.wait(timeout=LAUNCH_SECONDS) != 0
    assert not survivor.is_running() or survivor.status() == psutil.STATUS_ZOMBIE
    assert not (out / "final").exists()


@pytest.fixture(scope="module")
def runs(overrides: list[str], killed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The killed runs taken up, every stage whole and in pieces, runs that must fail: all in one launch."""
    root = tmp_path_factory.mktemp("runs")
    jobs = []

    def add(out: str, stage: str, *changes: str, copy: str = "", **more: object) -> None:
        job = dict(out=str(root / out), recipe=TINY, overrides=[*overrides, *changes], deepspeed=zero(stage))
        job |= dict(copy=str(root / copy) if copy else "", keep="", state={}, stop_after=None, file_bytes=0)
        jobs.append(job | more)

    for stage in STAGES:
        add(f"{stage}/whole", stage, f"train.validate_every={VALIDATE_EVERY}")
        add(f"{stage}/pieces", stage, stop_after=KILLED_AFTER, keep=str(root / stage / "half"))
    for stage in STAGES:
        add(f"{stage}/pieces", stage)
        add(f"{stage}/killed", stage, copy=str(killed / stage))
    add("other_world", "zero2", copy="zero2/whole", state={"processes": 3})
    add("other_stage", "zero1", copy="zero2/whole")
    (root / "unknown.json").write_text('{"zero_optimization": {"stage": 2, "no_such_setting": 1}}')
    add("unknown", str(root / "unknown.json"))
    add("full", "zero2", EVERY_STEP, copy="zero2/half", file_bytes=30_000)
    (root / "driver.py").write_text(DRIVER, encoding="utf-8")
    (root / "jobs.json").write_text(json.dumps(jobs), encoding="utf-8")
    done = subprocess.run(
        [*COMMAND, str(root / "driver.py"), str(root / "jobs.json")],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LAUNCH_SECONDS,
        check=False,
    )
    assert (root / "full" / "error0.txt").exists(), done.stderr[-4000:]
    assert done.returncode != 0
    return root


def weights(run: Path) -> dict[str, torch.Tensor]:
    lm = DualTrackLM.from_pretrained(run / "final")
    assert lm.tokenizer_fingerprint is not None
    return lm.state_dict()


def assert_same_run(one: Path, other: Path) -> None:
    """Weights and logged losses of two runs are equal within rounding."""
    first, second = weights(one), weights(other)
    assert set(first) == set(second)
    for name, tensor in first.items():
        assert torch.allclose(tensor, second[name], rtol=1e-5, atol=1e-6), name
    first_rows, second_rows = read_log(one), read_log(other)
    assert [row["step"] for row in first_rows] == [row["step"] for row in second_rows]
    assert len(first_rows) == STEPS
    for row, same in zip(first_rows, second_rows, strict=True):
        assert row["total"] == pytest.approx(same["total"], abs=2e-6)


def test_stages_agree_with_each_other(runs: Path) -> None:
    start = weights_at_start(runs)
    for stage in STAGES:
        assert_same_run(runs / "zero1" / "whole", runs / stage / "whole")
        moved = weights(runs / stage / "whole")
        assert any(not torch.allclose(moved[name], start[name], atol=1e-3) for name in start)


def weights_at_start(runs: Path) -> dict[str, torch.Tensor]:
    job = json.loads((runs / "jobs.json").read_text())[0]
    config = load_config(train.Config, job["recipe"], job["overrides"])
    torch.manual_seed(config.train.seed)
    task = train.build(config)
    return {name.removeprefix("lm."): tensor for name, tensor in task.objective.state_dict().items()}


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_in_pieces_ends_as_a_whole_one(runs: Path, stage: str) -> None:
    assert_same_run(runs / stage / "whole", runs / stage / "pieces")
    # Only the last checkpoint is kept, with a share for each process.
    checkpoint = runs / stage / "pieces" / "checkpoint"
    assert [path.name for path in checkpoint.glob("step-*")] == [f"step-{STEPS}"]
    assert len(list((checkpoint / f"step-{STEPS}").glob("*_optim_states.pt"))) == 2


def test_validation_is_the_same_at_every_stage(runs: Path) -> None:
    found = [
        [row["validation/nats"] for row in read_log(runs / stage / "whole") if "validation/nats" in row]
        for stage in STAGES
    ]
    assert len(found[0]) == STEPS // VALIDATE_EVERY
    assert np.allclose(found[0], found[1], atol=1e-5) and np.allclose(found[0], found[2], atol=1e-5)
    assert all(row["tokens_per_second"] > 0 for row in read_log(runs / "zero3" / "whole"))


def test_checkpoints_of_another_start_are_refused(runs: Path) -> None:
    for rank in range(2):
        told = (runs / "other_world" / f"error{rank}.txt").read_text()
        assert "is of 3 processes, this run has 2; start with as many" in told and "\n" not in told
        told = (runs / "other_stage" / f"error{rank}.txt").read_text()
        assert "is of ZeRO 2, this run of ZeRO 1" in told and "\n" not in told


def test_a_setting_that_deepspeed_does_not_know_is_one_line(runs: Path) -> None:
    told = (runs / "unknown" / "error0.txt").read_text()
    assert "DeepSpeed refuses the config" in told and "no_such_setting" in told and "\n" not in told


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(runs: Path) -> None:
    told = (runs / "full" / "error0.txt").read_text()
    assert f"cannot write the checkpoint of step {KILLED_AFTER + 1}" in told and "\n" not in told
    assert f"the one of step {KILLED_AFTER} stays" in told
    checkpoint = runs / "full" / "checkpoint"
    assert json.loads((checkpoint / "state.json").read_text())["step"] == KILLED_AFTER
    whole = checkpoint / f"step-{KILLED_AFTER}"
    assert len(list(whole.glob("*.pt"))) >= 3 and all(path.stat().st_size for path in whole.glob("*.pt"))


@pytest.mark.parametrize("stage", STAGES)
def test_a_killed_run_goes_on_where_it_was(killed: Path, runs: Path, stage: str) -> None:
    told = (killed / stage / "told.txt").read_text()
    errors = [line for line in told.splitlines() if line.startswith("error: process 0: ")]
    assert len(errors) == 1, told[-4000:]
    assert "has died" in errors[0] or "told to end" in errors[0]
    step = json.loads((killed / stage / "checkpoint" / "state.json").read_text())["step"]
    assert KILLED_AFTER - 1 <= step < STEPS and f"of step {step}" in errors[0]
    assert_same_run(runs / stage / "whole", runs / stage / "killed")
