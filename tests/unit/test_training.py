import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from duotok.recipes.training.log import read_log
from duotok.recipes.training.loop import learning_rate_factor, run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

# Started by torchrun over gloo: two processes train for two seconds, and the second one's clock runs fast.
FAST_CLOCK = """
import os, sys, time
from pathlib import Path
import torch
from torch import nn
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig

out, rank, real = Path(sys.argv[1]), int(os.environ["RANK"]), time.monotonic
start = real()
time.monotonic = lambda: start + (1 + rank) * (real() - start)

class Line(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs):
        return {"total": (self.layer(inputs)[:, 0] - inputs.sum(dim=1)).square().mean()}

def draw(rng):
    time.sleep(0.01)
    return {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()}

task = Task(Line(), draw, lambda folder: folder.mkdir())
config = TrainConfig(precision="fp32", warmup_steps=0, learning_rate=0.05, log_every=7)
run_training(task, config, out / "run", minutes=1 / 30)
(out / f"weights{rank}").write_bytes(task.objective.layer.weight.detach().numpy().tobytes())
"""


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, inputs):
        return {"total": (self.layer(inputs)[:, 0] - inputs.sum(dim=1)).square().mean()}


def make_task() -> Task:
    objective = Regression()
    return Task(
        objective,
        lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(16, 3))).float()},
        lambda folder: (folder.mkdir(), torch_save(objective, folder)),
    )


def torch_save(objective, folder):
    (folder / "weights.json").write_text(json.dumps(objective.layer[0].weight.tolist()))


def config(**changes) -> TrainConfig:
    settings = {"steps": 60, "learning_rate": 1e-2, "warmup_steps": 5, "ema_decay": 0.9, "precision": "fp32"}
    return TrainConfig(**(settings | changes))


def test_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    run_training(make_task(), config(), tmp_path / "whole")
    run_training(make_task(), config(), tmp_path / "pieces", stop_after=23)
    assert not (tmp_path / "pieces" / "final").exists()
    run_training(make_task(), config(), tmp_path / "pieces")
    whole, pieces = (tmp_path / n / "final" / "weights.json" for n in ("whole", "pieces"))
    assert whole.read_text() == pieces.read_text()
    for name in ("weights", "ema", "optimizer"):
        a, b = (tmp_path / n / "checkpoint" / f"{name}.safetensors" for n in ("whole", "pieces"))
        assert a.read_bytes() == b.read_bytes()


def test_loss_falls_and_is_logged(tmp_path):
    run_training(make_task(), config(log_every=5), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert rows[0]["step"] == 1 and rows[-1]["step"] == 60
    assert rows[-1]["total"] < 0.5 * rows[0]["total"]


def test_minutes_end_the_run(tmp_path):
    run_training(make_task(), config(steps=10), tmp_path / "run", minutes=0.01)
    assert (tmp_path / "run" / "final").exists()
    with pytest.raises(ConfigError, match="minutes must be above 0, got 0"):
        run_training(make_task(), config(), tmp_path, minutes=0)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    run_training(make_task(), config(steps=2), tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run_training(make_task(), config(), tmp_path / "run")
    run_training(make_task(), config(steps=2), tmp_path / "other")
    task = make_task()
    task.objective.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="another recipe"):
        run_training(task, config(), tmp_path / "other")


def test_an_average_that_is_turned_on_later_starts_from_the_weights(tmp_path):
    run_training(make_task(), config(ema_decay=0.0), tmp_path, stop_after=40)
    weights = load_file(tmp_path / "checkpoint" / "weights.safetensors")
    run_training(make_task(), config(ema_decay=0.999999, steps=41), tmp_path)
    average = load_file(tmp_path / "checkpoint" / "ema.safetensors")
    now = load_file(tmp_path / "checkpoint" / "weights.safetensors")
    for name, before in weights.items():
        expected = before + 0.18 * (now[name] - before)  # after 41 steps the average keeps 42 / 51
        assert torch.allclose(average[name], expected, atol=1e-3)
        assert not torch.equal(average[name], now[name])


def test_processes_that_train_for_minutes_stay_together(tmp_path):
    (tmp_path / "program.py").write_text(FAST_CLOCK, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command += [str(tmp_path / "program.py"), str(tmp_path)]
    run = {"env": environment, "capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run(command, **run, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "weights0").read_bytes() == (tmp_path / "weights1").read_bytes()
    rates = [row["learning_rate"] for row in read_log(tmp_path / "run")]
    assert len(rates) > 2 and rates[-1] < 0.5 * rates[0]


def test_learning_rate_warms_up_and_decays():
    settings = config(steps=100, warmup_steps=10, final_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(settings, step, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, abs=0.01)
    assert max(factors) > 0.95
    assert factors[100] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="precision"):
        config(precision="fp8")
