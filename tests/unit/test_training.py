import json

import pytest
import torch
from torch import nn

from duotok.recipes.training.loop import learning_rate_factor, run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DuoTokError


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


def test_nan_loss_stops_with_the_checkpoint_named(tmp_path):
    task = make_task()
    task.make_batch = lambda rng: {"inputs": torch.full((4, 3), float("nan"))}
    with pytest.raises(DuoTokError, match="not finite at step 1"):
        run_training(task, config(), tmp_path / "run")


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


def test_learning_rate_warms_up_and_decays():
    settings = config(steps=100, warmup_steps=10, final_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(settings, step, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, abs=0.01)
    assert max(factors) > 0.95
    assert factors[100] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="precision"):
        config(precision="fp8")
