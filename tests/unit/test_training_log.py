"""Where figures go and how they are read back; and the picture of the curves."""

import importlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from torch import nn

from duotok.recipes.training.log import (
    RunLog,
    draw_runs,
    main,
    panel_of,
    read_log,
    section_of,
    smooth,
)
from duotok.recipes.training.loop import run_training
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DuoTokError

NAMES = ("total", "mel", "mel/vocal", "vocal_nats", "accompaniment_nats", "validation/cnbpt/unconditional")


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, inputs):
        return {"total": (self.weight - inputs).square().sum()}


def train(out, **changes) -> None:
    settings = dict(steps=4, precision="fp32", log_every=1, checkpoint_minutes=0)
    task = Task(Point(), lambda rng: {"inputs": torch.zeros(2)}, lambda folder: folder.mkdir())
    run_training(task, TrainConfig(**settings, **changes), out, stop_after=3)


def write_run(folder, steps: int, scale: float) -> None:
    folder.mkdir(parents=True)
    with RunLog(folder, first_step=0, log_to="none", settings={}, on=True) as log:
        for step in range(1, steps + 1):
            row = {name: scale / step for name in NAMES if step % 2 or "validation" not in name}
            log.write(
                {"step": step, "seconds": 60.0 * step, "learning_rate": 1e-4, "gradient_norm": 2.0, **row}
            )


def test_sections_and_panels_of_figures():
    sections = {
        name: section_of(name) for name in ("step", "learning_rate", "mfu", "tokens_per_second", *NAMES)
    }
    assert sections["step"] == "place" and sections["learning_rate"] == "optimizer"
    assert sections["mfu"] == sections["tokens_per_second"] == "speed"
    assert sections["validation/cnbpt/unconditional"] == "validation"
    assert {sections[name] for name in NAMES[:-1]} == {"loss"}
    panels = ["total", "mel", "mel", "nats", "nats", "validation/cnbpt"]
    assert [panel_of(name) for name in NAMES] == panels


def test_rows_taken_again_replace_the_earlier_ones(tmp_path):
    rows = [{"step": step, "total": 1.0} for step in (1, 2, 3, 4)] + [{"step": 3, "total": 2.0}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "log.jsonl").write_text(text + '{"step": 4, "to')
    found = read_log(tmp_path)
    assert [(row["step"], row["total"]) for row in found] == [(1, 1.0), (2, 1.0), (3, 2.0)]
    assert read_log(tmp_path / "log.jsonl") == found
    (tmp_path / "log.jsonl").write_text("{}\n" + text)
    with pytest.raises(DuoTokError, match="line 1, is not a row"):
        read_log(tmp_path)
    (tmp_path / "log.jsonl").write_text("")
    with pytest.raises(DuoTokError, match="no rows yet"):
        read_log(tmp_path)
    with pytest.raises(DuoTokError, match="give the folder of a training run"):
        read_log(tmp_path / "nowhere")


def test_other_processes_write_nothing(tmp_path):
    with RunLog(tmp_path, first_step=0, log_to="none", settings={}, on=False) as log:
        log.write({"step": 1, "total": 1.0})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["trackio", "wandb"])
def test_a_tracker_that_is_missing_is_told_before_the_first_step(kind, tmp_path, monkeypatch):
    real = importlib.util.find_spec
    monkeypatch.setattr(
        "duotok.recipes.training.log.find_spec", lambda name: None if name == kind else real(name)
    )
    with pytest.raises(ConfigError, match=f"log to {kind}, but {kind} is missing: pip install {kind}"):
        train(tmp_path, log_to=f"{kind}:songs")
    assert not (tmp_path / "log.jsonl").exists()
    train(tmp_path)


@pytest.mark.parametrize("log_to", ["paper", "tensorboard:songs", "trackio:", ""])
def test_where_to_log_is_checked(log_to):
    with pytest.raises(ConfigError, match=f"train.log_to must be .* got {log_to!r}"):
        TrainConfig(log_to=log_to)


def test_weights_and_biases_goes_on_in_the_same_run(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train(tmp_path, log_to="wandb:songs")
    name = (tmp_path / "wandb_run.txt").read_text()
    train(tmp_path, log_to="wandb:songs")
    assert (tmp_path / "wandb_run.txt").read_text() == name
    assert len(list((tmp_path / "wandb").glob(f"offline-run-*-{name}"))) >= 1


def test_trackio_keeps_the_figures_and_goes_on_in_the_same_run(tmp_path):
    pytest.importorskip("trackio", reason="trackio is not installed")
    script = "import sys; from pathlib import Path; from duotok.recipes.training.log import RunLog\n"
    script += "for step in (1, 2):\n"
    script += (
        "    with RunLog(Path('lm'), first_step=0, log_to='trackio', settings={'a': 1}, on=True) as log:\n"
    )
    script += "        log.write({'step': step, 'seconds': 1.0, 'total': 2.0 / step, 'learning_rate': 0.1})\n"
    (tmp_path / "lm").mkdir()
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path / "kept"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    rows = sqlite3.connect(tmp_path / "kept" / "duotok.db").execute(
        "select run_name, step, metrics from metrics"
    )
    found = [(name, step, json.loads(figures)) for name, step, figures in rows]
    name = f"lm-{(tmp_path / 'lm' / 'trackio_run.txt').read_text()}"
    assert [(run, step) for run, step, _ in found] == [(name, 1), (name, 2)]
    assert found[1][2] == {"loss/total": 1.0, "optimizer/learning_rate": 0.1}
    assert len(read_log(tmp_path / "lm")) == 2 and not (tmp_path / "lm" / "tensorboard").exists()


def test_tensorboard_holds_the_same_figures(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    events = importlib.import_module("tensorboard.backend.event_processing.event_accumulator")
    train(tmp_path)
    # A killed run logged step 3 and more; the checkpoint of step 2 is taken up again.
    state = json.loads((tmp_path / "checkpoint" / "state.json").read_text())
    (tmp_path / "checkpoint" / "state.json").write_text(json.dumps(state | {"step": 2}))
    train(tmp_path)
    board = events.EventAccumulator(str(tmp_path / "tensorboard"))
    board.Reload()
    rows = read_log(tmp_path)
    scalars = board.Scalars("loss/total")
    assert [scalar.step for scalar in scalars] == [row["step"] for row in rows] == [1, 2, 3, 4]
    assert np.allclose([scalar.value for scalar in scalars], [row["total"] for row in rows], atol=1e-5)
    assert {"optimizer/learning_rate", "optimizer/gradient_norm", "speed/peak_memory_gb"} <= set(
        board.Tags()["scalars"]
    )


def test_smoothing():
    values = np.array([4.0, 0.0, 2.0])
    assert np.array_equal(smooth(values, 0.0), values)
    assert np.allclose(smooth(np.full(50, 3.0), 0.2), 3.0)
    noise = np.random.default_rng(0).normal(size=400)
    assert smooth(noise, 0.1)[100:].std() < 0.3 * noise.std()


def test_the_picture_of_one_and_of_several_runs(tmp_path, capsys):
    for number, (steps, scale) in enumerate(((20, 3.0), (12, 5.0))):
        write_run(tmp_path / f"run{number}" / "lm", steps, scale)
    runs = [str(tmp_path / f"run{number}" / "lm") for number in range(2)]
    one, both = tmp_path / "pictures" / "one.png", tmp_path / "both.png"
    assert main([runs[0], "--out", str(one)]) == 0
    assert main([*runs, "--out", str(both)]) == 0
    assert capsys.readouterr().out.split() == [str(one), str(both)]
    first, second = imread(one), imread(both)
    assert first.shape == second.shape and min(first.shape[:2]) > 400
    assert first[..., :3].std() > 0.05 and not np.array_equal(first, second)
    drawn = draw_runs({"a": read_log(tmp_path / "run0" / "lm")}, one)
    assert drawn[0] == "total" and {"mel", "nats", "validation/cnbpt", "learning_rate"} <= set(drawn)
    assert not {"step", "seconds"} & set(drawn)


def test_plot_errors_are_one_line(tmp_path, capsys, monkeypatch):
    assert main([str(tmp_path / "nowhere"), "--out", str(tmp_path / "x.png")]) == 1
    assert capsys.readouterr().err.count("\n") == 1
    write_run(tmp_path / "run", 2, 1.0)
    run = str(tmp_path / "run")
    assert main([run, "--out", str(tmp_path / "x.nothing")]) == 1
    assert "ending in .png" in capsys.readouterr().err
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert main([run, "--out", str(tmp_path / "x.png")]) == 1
    assert "pip install '.[evaluation]'" in capsys.readouterr().err.splitlines()[-1]
