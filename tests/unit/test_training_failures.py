"""What ends a run: one clear line each, and a last checkpoint that can be used."""

import json
import resource
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from duotok.recipes.training.failures import explained_failures
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.run_state import TrainingState
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DuoTokError

SIZE = 4096


class Scale(nn.Module):
    """One long vector; its checkpoint has a size that a limit can cut."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(SIZE))
        self.passes = 0
        self.broken_at: int | None = None
        self.wanted_bytes = 0

    def forward(self, inputs):
        self.passes += 1
        if self.wanted_bytes:
            torch.empty(self.wanted_bytes, dtype=torch.uint8)
        total = (self.weight * inputs).square().mean()
        return {"total": total * float("nan") if self.passes == self.broken_at else total}


def make_task(**fields) -> Task:
    def export(folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        (folder / "weights").write_bytes(b"0" * 4 * SIZE)

    return Task(
        Scale(), lambda rng: {"inputs": torch.from_numpy(rng.normal(size=SIZE)).float()}, export, **fields
    )


def config(**changes) -> TrainConfig:
    settings = dict(steps=8, warmup_steps=0, precision="fp32", log_every=1, checkpoint_minutes=0)
    return TrainConfig(**(settings | changes))


@contextmanager
def files_up_to(size: int):
    """What a full disk does to a file, done by the kernel: writing past a size fails."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def is_one_line(error: BaseException) -> bool:
    return "\n" not in str(error)


def test_a_full_disk_keeps_the_last_checkpoint(tmp_path):
    out = tmp_path / "run"
    run_training(make_task(), config(), out, stop_after=3)
    before = {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()}
    with (
        files_up_to(2 * SIZE),
        pytest.raises(CheckpointError, match="of step 4 .*the one of step 3 stays") as told,
    ):
        run_training(make_task(), config(), out)
    assert is_one_line(told.value) and "free some space" in str(told.value)
    assert {path.name: path.read_bytes() for path in (out / "checkpoint").iterdir()} == before
    assert not list(out.glob(".checkpoint*"))
    # With space again the run goes on, to the weights of an uninterrupted one.
    run_training(make_task(), config(), out)
    run_training(make_task(), config(), tmp_path / "whole")
    a, b = (tmp_path / name / "checkpoint" / "weights.safetensors" for name in ("run", "whole"))
    assert a.read_bytes() == b.read_bytes()


SLOW_WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from duotok.recipes.training import run_state
from duotok.recipes.training.loop import run_training
from test_training_failures import config, make_task

out, write = Path(sys.argv[2]), run_state.write_tensors

def write_slowly(path, tensors):
    write(path, tensors)
    state = out / "checkpoint" / "state.json"
    if state.exists() and '"step": 2' in state.read_text():
        time.sleep(3600)

run_state.write_tensors = write_slowly
run_training(make_task(), config(), out)
"""


def test_a_run_killed_while_a_checkpoint_is_written_goes_on_from_the_one_before(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-c", SLOW_WRITER, str(Path(__file__).parent), str(out)]
    run = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    log = out / "log.jsonl"
    # The checkpoint of step 3 is half written, and yet step 4 is taken.
    while run.poll() is None and not (log.exists() and '"step": 4' in log.read_text()):
        time.sleep(0.02)
    assert run.poll() is None
    run.kill()
    run.wait()
    assert list(out.glob(".checkpoint.*.part/weights.safetensors"))
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 2
    run_training(make_task(), config(), out)
    assert not list(out.glob(".checkpoint*"))
    run_training(make_task(), config(), tmp_path / "whole")
    for name in ("weights", "optimizer"):
        a, b = (tmp_path / each / "checkpoint" / f"{name}.safetensors" for each in ("run", "whole"))
        assert a.read_bytes() == b.read_bytes()


def test_a_disk_full_at_the_log_or_at_the_export_is_one_line(tmp_path):
    out = tmp_path / "run"
    run_training(make_task(), config(), out, stop_after=1)
    (out / "log.jsonl").write_bytes(b"0" * 8 * SIZE + b"\n")
    with (
        files_up_to(8 * SIZE + 5),
        pytest.raises(DuoTokError, match=r"cannot write the log .*log\.jsonl") as told,
    ):
        run_training(make_task(), config(checkpoint_minutes=60), out)
    assert is_one_line(told.value)
    task = make_task()
    task.export = lambda folder: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    with pytest.raises(
        CheckpointError, match="final .No space left on device.; the last checkpoint is whole"
    ):
        run_training(task, config(), out)
    assert json.loads((out / "checkpoint" / "state.json").read_text())["step"] == 8


def test_what_a_killed_run_leaves_half_written_is_put_right(tmp_path):
    out = tmp_path / "run"
    run_training(make_task(), config(), out, stop_after=2)
    # Killed between the two renames of a save, and in the middle of a row.
    (out / "checkpoint").rename(out / ".checkpoint.123.old")
    with (out / "log.jsonl").open("a") as file:
        file.write('{"step": 3, "sec')
    run_training(make_task(), config(), out)
    rows = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 9))


@pytest.mark.parametrize("log_every", [1, 100])
def test_a_loss_that_is_not_finite_names_its_step_and_batch(tmp_path, log_every):
    out = tmp_path / "run"
    run_training(make_task(), config(), out, stop_after=2)
    task = make_task()
    task.objective.broken_at = 6  # micro-batch 1 of step 5
    settings = config(accumulate=2, log_every=log_every, seed=7, checkpoint_minutes=1e-9)
    with pytest.raises(DuoTokError, match="loss is not finite at step 5, process 0, micro-batch 1") as told:
        run_training(task, settings, out)
    assert is_one_line(told.value)
    assert "default_rng((7, 4, 0, 1))" in str(told.value) and "train.learning_rate" in str(told.value)
    step = json.loads((out / "checkpoint" / "state.json").read_text())["step"]
    assert f"the last good checkpoint is {out / 'checkpoint'}, of step {step}" in str(told.value)
    assert step == 4
    task = make_task()
    run_training(task, config(), out)
    assert bool(task.objective.weight.isfinite().all())


def test_broken_data_and_broken_gradients_are_told_apart(tmp_path):
    task = make_task()
    task.make_batch = lambda rng: {"inputs": torch.full((SIZE,), float("inf"))}
    with pytest.raises(DuoTokError, match="its 'inputs' holds NaN or infinite values.* no checkpoint yet"):
        run_training(task, config(), tmp_path / "data")
    task = make_task()
    task.objective.weight.register_hook(lambda gradient: gradient * float("nan"))
    with pytest.raises(DuoTokError, match="the gradient is not finite at step 1"):
        run_training(task, config(), tmp_path / "gradient")
    assert not (tmp_path / "gradient" / "checkpoint").exists()


def test_out_of_memory_says_which_settings_to_change(tmp_path):
    task = make_task()
    task.objective.wanted_bytes = 1 << 50
    with pytest.raises(DuoTokError, match="out of memory at step 1") as told:
        run_training(task, config(batch_size=6, accumulate=2), tmp_path)
    message = str(told.value)
    assert is_one_line(told.value) and "gradient_checkpointing" not in message
    assert "lower train.batch_size (6) and raise train.accumulate (2)" in message


def test_failures_are_explained_and_others_left_alone(tmp_path):
    class Checkpointed(nn.Module):
        config = type("Config", (), {"gradient_checkpointing": False})

    def fail(error):
        with explained_failures(config(), nn.Sequential(Checkpointed()), state, tmp_path):
            raise error

    layer = nn.Linear(1, 1)
    state = TrainingState(layer, torch.optim.AdamW(layer.parameters()), use_ema=False)
    state.step = state.saved_step = 11
    with pytest.raises(DuoTokError, match="step 12.*of step 11.*gradient_checkpointing=true"):
        fail(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"))
    with pytest.raises(DuoTokError, match="another process of this run has died"):
        fail(RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:1"))
    with pytest.raises(RuntimeError, match="shapes do not match"):
        fail(RuntimeError("shapes do not match"))


def test_checkpoints_of_another_kind_are_refused(tmp_path):
    out = tmp_path / "run"
    (out / "checkpoint" / "step-3").mkdir(parents=True)
    (out / "checkpoint" / "state.json").write_text("{}")
    with pytest.raises(CheckpointError, match="under DeepSpeed; give --deepspeed"):
        run_training(make_task(), config(), out)
    with pytest.raises(CheckpointError, match="cannot make the folder"):
        run_training(make_task(), config(), tmp_path / "run" / "checkpoint" / "state.json" / "run")


def test_deepspeed_refuses_averages_and_wants_a_launcher(tmp_path, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(ConfigError, match="ema_decay must be 0"):
        run_training(make_task(), config(ema_decay=0.9), tmp_path, deepspeed=tmp_path / "zero.json")
    with pytest.raises(ConfigError, match="start with torchrun"):
        run_training(make_task(), config(), tmp_path, deepspeed=tmp_path / "zero.json")


def test_sigterm_ends_a_run_with_one_line(tmp_path):
    program = (
        "import os, signal, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from duotok.recipes.training.failures import stopped_by_signal\n"
        "with stopped_by_signal(SimpleNamespace(step=4, saved_step=3), Path('run')):\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    sys.exit(5)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 128 + signal.SIGTERM
    assert done.stderr.count("\n") == 1
    assert "told to end (SIGTERM) at step 5" in done.stderr and "of step 3" in done.stderr
