"""Training: what a step computes, its batches, the figures of its row; exact resume; several processes."""

import itertools
import json
import multiprocessing
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from duotok.recipes.training.batches import MicroBatch, MicroBatches, open_batches
from duotok.recipes.training.log import read_log
from duotok.recipes.training.loop import choose_precision, learning_rate_factor, run_training
from duotok.recipes.training.meter import measure_peak_flops
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError, DuoTokError

# Started by torchrun over gloo: two processes train for six seconds, and the second one's clock runs fast.
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

def validate(process, processes):
    assert (process, processes) == (rank, 2)
    return {"mean": (10.0 * rank, 1 + 3 * rank)}  # of 1 number, and of 4

task = Task(Line(), draw, lambda folder: folder.mkdir(), validate)
config = TrainConfig(precision="fp32", warmup_steps=0, learning_rate=0.05, log_every=2, validate_every=2)
run_training(task, config, out / "run", minutes=1 / 10)
(out / f"weights{rank}").write_bytes(task.objective.layer.weight.detach().numpy().tobytes())
"""


class Line(nn.Module):
    """Least squares; the mean over the examples of a batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Linear(3, 1)

    def forward(self, inputs):
        loss = (self.layer(inputs)[:, 0] - inputs.sum(dim=1)).square().mean()
        return {"total": loss, "square/all": 2 * loss}


def config(**changes) -> TrainConfig:
    settings = dict(steps=6, learning_rate=1e-2, warmup_steps=2, precision="fp32", log_every=1, batch_size=8)
    return TrainConfig(**(settings | changes))


def make_task(make_batch, **fields) -> Task:
    objective = Line()
    return Task(objective, make_batch, lambda folder: folder.mkdir(), **fields)


def test_two_micro_batches_of_four_are_one_batch_of_eight(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")  # as accelerate launch sets it
    drawn = []

    def draw_four(rng):
        drawn.append(torch.from_numpy(rng.normal(size=(4, 3))).float())
        return {"inputs": drawn[-1]}

    run_training(make_task(draw_four), config(accumulate=2, batch_size=4), tmp_path / "halves")
    halves = iter(drawn[:12])

    def draw_eight(rng):
        return {"inputs": torch.cat([next(halves, drawn[0]), next(halves, drawn[0])])}

    run_training(make_task(draw_eight), config(), tmp_path / "wholes")
    found = [
        load_file(tmp_path / name / "checkpoint" / "weights.safetensors") for name in ("halves", "wholes")
    ]
    for name in found[0]:
        assert torch.allclose(found[0][name], found[1][name], rtol=1e-6, atol=1e-7)
    for half, whole in zip(read_log(tmp_path / "halves"), read_log(tmp_path / "wholes"), strict=True):
        assert half["total"] == pytest.approx(whole["total"], rel=1e-5)
        assert half["gradient_norm"] == pytest.approx(whole["gradient_norm"], rel=1e-4)
    # Not the same as a step of the first half alone.
    run_training(make_task(lambda rng: {"inputs": drawn[0]}), config(), tmp_path / "first")
    first = load_file(tmp_path / "first" / "checkpoint" / "weights.safetensors")
    assert not torch.allclose(first["layer.weight"], found[0]["layer.weight"], rtol=1e-3)


@pytest.mark.parametrize("workers", [0, 2])
def test_micro_batches_come_in_order_and_are_functions_of_their_keys(workers):
    task = make_task(lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(2, 3)))})
    settings = config(accumulate=2, seed=5, workers=workers)
    with open_batches(task, settings, process=1, first_step=3, device=torch.device("cpu")) as batches:
        found = list(itertools.islice(batches, 4))
    assert [tuple(batch.key) for batch in found] == [(5, 3, 1, 0), (5, 3, 1, 1), (5, 4, 1, 0), (5, 4, 1, 1)]
    for number, batch in enumerate(found, start=6):
        again = MicroBatches(task, settings, process=1)[number]
        assert isinstance(again, MicroBatch) and again.key == batch.key
        assert torch.equal(again.tensors["inputs"], batch.tensors["inputs"])
    assert len({float(batch.tensors["inputs"][0, 0]) for batch in found}) == 4
    assert len({batch.key.torch_seed() for batch in found}) == 4


def test_workers_tell_errors_in_one_line_and_leave_with_the_run(tmp_path):
    def draw(rng):
        if rng.integers(1 << 30) == np.random.default_rng((0, 1, 0, 0)).integers(1 << 30):
            raise DataError("shard 7 is damaged")
        return {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()}

    others = set(multiprocessing.active_children())
    with pytest.raises(DataError, match="^shard 7 is damaged$"):
        run_training(make_task(draw), config(workers=1), tmp_path / "damaged")
    assert read_log(tmp_path / "damaged")[-1]["step"] == 1
    with pytest.raises(DuoTokError, match=r"was killed at step 1; .*lower train.workers \(1\)"):
        run_training(make_task(lambda rng: os._exit(9)), config(workers=1), tmp_path / "killed")
    deadline = time.monotonic() + 10  # on a busy machine a process takes a while to end
    while not others.issuperset(multiprocessing.active_children()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert others.issuperset(multiprocessing.active_children())


def test_gradients_are_clipped_to_the_global_norm(tmp_path):
    def task():
        return make_task(lambda rng: {"inputs": 100 * torch.from_numpy(rng.normal(size=(4, 3))).float()})

    # AdamW hides the scale of a gradient, not its share of a longer one: its moments keep it.
    run_training(task(), config(steps=1, gradient_clip=0.5), tmp_path)
    assert read_log(tmp_path)[0]["gradient_norm"] > 100
    moments = load_file(tmp_path / "checkpoint" / "optimizer.safetensors")
    norm = torch.cat([m.flatten() for n, m in moments.items() if n.endswith(":exp_avg")]).norm() / 0.1
    assert norm.item() == pytest.approx(0.5, rel=1e-3)


def test_a_row_holds_means_speed_and_memory(tmp_path):
    seen = []
    task = make_task(
        lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()},
        unit="frames",
        count_units=lambda batch: seen.append(batch["inputs"].shape[0]) or 1000,
        count_flops=lambda batch: 1e6,
    )
    run_training(task, config(steps=8, accumulate=2, log_every=4), tmp_path)
    run_training(
        make_task(lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()}),
        config(steps=8, accumulate=2, log_every=1),
        tmp_path / "each",
    )
    rows, each = read_log(tmp_path), read_log(tmp_path / "each")
    assert [row["step"] for row in rows] == [1, 4, 8]
    assert rows[2]["total"] == pytest.approx(np.mean([row["total"] for row in each[4:]]), rel=1e-4)
    assert rows[2]["square/all"] == pytest.approx(2 * rows[2]["total"], rel=1e-4)
    assert "frames_per_second" not in each[0] and "mfu" not in each[0]
    assert set(seen) == {4}
    seconds = rows[2]["seconds"] - rows[1]["seconds"]
    assert rows[2]["frames_per_second"] == pytest.approx(8000 / max(seconds, 1e-3), rel=0.9)
    assert 0 < rows[2]["mfu"] < 1
    assert 0.01 < rows[2]["peak_memory_gb"] < 100
    # Utilization is the share of the peak that the FLOPs of the interval took.
    peak = rows[2]["frames_per_second"] * 1e6 / 1000 / rows[2]["mfu"]
    assert 1e8 < peak < 1e15


def test_the_peak_is_that_of_large_products():
    peak = measure_peak_flops(torch.device("cpu"), "no")
    # Small products, with their overhead, do not beat it.
    small = torch.ones(16, 16)
    start = time.perf_counter()
    for _ in range(200):
        small @ small
    assert 1e8 < peak and 200 * 2 * 16**3 / (time.perf_counter() - start) < peak


def test_validation_sees_averaged_weights_in_eval_mode_and_changes_nothing(tmp_path):
    seen = []

    def run(name, **changes):
        task = make_task(lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()})

        def validate(process, processes):
            torch.randn(3)  # uses up random numbers
            seen.append((task.objective.training, torch.is_grad_enabled(), task.objective.layer.bias.item()))
            return {"bias/averaged": (3 * task.objective.layer.bias.item(), 3)}

        task.validate = validate
        run_training(task, config(ema_decay=0.9, **changes), tmp_path / name)

    run("validated", validate_every=3, log_every=4)
    assert [(training, gradients) for training, gradients, _ in seen] == [(False, False)] * 2
    rows = read_log(tmp_path / "validated")
    assert [row["step"] for row in rows if "validation/bias/averaged" in row] == [3, 6]
    averaged = load_file(tmp_path / "validated" / "checkpoint" / "ema.safetensors")["layer.bias"].item()
    assert rows[-1]["validation/bias/averaged"] == pytest.approx(averaged, abs=1e-6)
    run("plain")
    assert len(seen) == 2
    a, b = (tmp_path / n / "checkpoint" / "weights.safetensors" for n in ("validated", "plain"))
    assert a.read_bytes() == b.read_bytes()
    assert load_file(a)["layer.bias"].item() != pytest.approx(averaged, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [("accumulate", 0), ("gradient_clip", 0.0), ("learning_rate", float("nan")), ("validate_every", -1)],
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ConfigError, match=f"train.{name}"):
        config(**{name: value})


def test_precision_follows_the_processor(monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("asks about CPUs")
    for native in (True, False):
        for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
            monkeypatch.setattr(torch.cpu, question, lambda native=native: native)
        assert choose_precision("auto") == ("bf16" if native else "no")
    assert choose_precision("fp32") == "no" and choose_precision("bf16") == "bf16"


class Stack(nn.Module):
    """Blocks that tell how often they are passed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(3, 3), nn.Tanh()) for _ in range(2))
        self.passes = 0
        self.blocks[0][0].register_forward_hook(self.count)

    def count(self, *_) -> None:
        self.passes += 1

    def forward(self, inputs):
        for block in self.blocks:
            inputs = block(inputs)
        return {"total": inputs.square().mean()}


@pytest.mark.parametrize("setting", ["gradient_checkpointing", "compile"])
def test_blocks_that_are_compiled_or_computed_again_learn_the_same(setting, tmp_path, monkeypatch):
    compiled = []

    def compile_without_c(function):  # tracing is seconds, C++ of it minutes
        compiled.append(function)
        return real(function, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", compile_without_c)

    def draw(rng):
        return {"inputs": torch.from_numpy(rng.normal(size=(4, 3))).float()}

    passes = []
    for name, changes in (("plain", {}), ("changed", {setting: True})):
        task = Task(Stack(), draw, lambda folder: folder.mkdir())
        run_training(task, config(steps=2, **changes), tmp_path / name)
        passes.append(task.objective.passes)
        assert "forward" not in vars(task.objective.blocks[0])
    plain, changed = (
        load_file(tmp_path / name / "checkpoint" / "weights.safetensors") for name in ("plain", "changed")
    )
    assert plain.keys() == changed.keys()
    assert all(torch.allclose(plain[name], changed[name], atol=1e-6) for name in plain)
    assert passes[0] == 2 and (passes[1] == 4) is (setting == "gradient_checkpointing")
    assert len(compiled) == (2 if setting == "compile" else 0)
    if setting == "compile" and not torch.cuda.is_available():
        monkeypatch.setenv("CXX", "no-such-compiler")
        with pytest.raises(ConfigError, match=r"needs a C\+\+ compiler \(no-such-compiler\)"):
            run_training(task, config(steps=3, compile=True), tmp_path / "changed")


def test_runs_of_different_precision_share_a_process(tmp_path):
    products = []

    class Watched(Line):
        def forward(self, inputs):
            products.append(self.layer(inputs).dtype)
            return super().forward(inputs)

    def draw(rng):
        return {"inputs": torch.from_numpy(rng.normal(size=(8, 3))).float()}

    for number, precision in enumerate(("bf16", "fp32", "bf16")):
        task = Task(Watched(), draw, lambda folder: folder.mkdir())
        run_training(task, config(steps=1, precision=precision), tmp_path / str(number))
    assert products == [torch.bfloat16, torch.float32, torch.bfloat16]


def test_validation_is_in_full_precision(tmp_path):
    def draw(rng):
        return {"inputs": torch.from_numpy(rng.normal(size=(8, 3))).float()}

    task, found = make_task(draw), []
    assert isinstance(task.objective, Line)
    layer = task.objective.layer

    def measure(process, processes):
        found.append(layer(torch.ones(1, 3)).dtype)
        return {"figure": (0.0, 1)}

    task.validate = measure
    run_training(task, config(steps=2, precision="bf16", validate_every=1), tmp_path / "run")
    assert found == [torch.float32] * 2


class Regression(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.layer = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 1))

    def forward(self, inputs):
        return {"total": (self.layer(inputs)[:, 0] - inputs.sum(dim=1)).square().mean()}


def make_regression() -> Task:
    objective = Regression()

    def export(folder):
        folder.mkdir()
        (folder / "weights.json").write_text(json.dumps(objective.layer[0].weight.tolist()))

    return Task(objective, lambda rng: {"inputs": torch.from_numpy(rng.normal(size=(16, 3))).float()}, export)


def long_config(**changes) -> TrainConfig:
    settings = {"steps": 60, "learning_rate": 1e-2, "warmup_steps": 5, "ema_decay": 0.9, "precision": "fp32"}
    return TrainConfig(**(settings | changes))


def test_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    run_training(make_regression(), long_config(), tmp_path / "whole")
    rows = read_log(tmp_path / "whole")
    assert rows[0]["step"] == 1 and rows[-1]["step"] == 60 and rows[-1]["total"] < 0.5 * rows[0]["total"]
    run_training(make_regression(), long_config(), tmp_path / "pieces", stop_after=23)
    assert not (tmp_path / "pieces" / "final").exists()
    run_training(make_regression(), long_config(), tmp_path / "pieces")
    whole, pieces = (tmp_path / n / "final" / "weights.json" for n in ("whole", "pieces"))
    assert whole.read_text() == pieces.read_text()
    for name in ("weights", "ema", "optimizer"):
        a, b = (tmp_path / n / "checkpoint" / f"{name}.safetensors" for n in ("whole", "pieces"))
        assert a.read_bytes() == b.read_bytes()


def test_minutes_end_the_run(tmp_path):
    run_training(make_regression(), long_config(steps=10), tmp_path / "run", minutes=0.01)
    assert (tmp_path / "run" / "final").exists()
    with pytest.raises(ConfigError, match="minutes must be above 0, got 0"):
        run_training(make_regression(), long_config(), tmp_path, minutes=0)


def test_damaged_and_foreign_checkpoints_are_named(tmp_path):
    run_training(make_regression(), long_config(steps=2), tmp_path / "run")
    (tmp_path / "run" / "checkpoint" / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match="damaged"):
        run_training(make_regression(), long_config(), tmp_path / "run")
    run_training(make_regression(), long_config(steps=2), tmp_path / "other")
    task = make_regression()
    task.objective.extra = nn.Linear(1, 1)
    with pytest.raises(CheckpointError, match="another recipe"):
        run_training(task, long_config(), tmp_path / "other")
    task = make_regression()  # the same weights, of which one is trained no longer
    next(task.objective.parameters()).requires_grad_(False)
    with pytest.raises(CheckpointError, match="another recipe"):
        run_training(task, long_config(), tmp_path / "other")
    task = make_regression()
    wider = next(each for each in task.objective.modules() if isinstance(each, nn.Linear))
    wider.weight = nn.Parameter(torch.zeros(7, 5))
    with pytest.raises(CheckpointError, match="another recipe"):
        run_training(task, long_config(), tmp_path / "other")


def test_an_average_that_is_turned_on_later_starts_from_the_weights(tmp_path):
    run_training(make_regression(), long_config(ema_decay=0.0), tmp_path, stop_after=40)
    weights = load_file(tmp_path / "checkpoint" / "weights.safetensors")
    run_training(make_regression(), long_config(ema_decay=0.999999, steps=41), tmp_path)
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
    rows = read_log(tmp_path / "run")
    assert {row["validation/mean"] for row in rows[1:]} == {2.0}  # over all numbers, not over processes
    rates = [row["learning_rate"] for row in rows]
    assert len(rates) > 2 and rates[-1] < 0.5 * rates[0]


def test_learning_rate_warms_up_and_decays():
    settings = long_config(steps=100, warmup_steps=10, final_learning_rate_ratio=0.1)
    factors = [learning_rate_factor(settings, step, step / 100) for step in range(101)]
    assert factors[0] == pytest.approx(0.1, abs=0.01)
    assert max(factors) > 0.95
    assert factors[100] == pytest.approx(0.1)
    with pytest.raises(ConfigError, match="precision"):
        long_config(precision="fp8")
