"""What a step computes: accumulation, its batches, clipping, the learning rate, the figures of its row."""

import itertools
import json
import multiprocessing
import os
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from duotok.recipes.training.batches import MicroBatch, MicroBatches, open_batches
from duotok.recipes.training.loop import choose_precision, run_training
from duotok.recipes.training.meter import measure_peak_flops
from duotok.recipes.training.task import Task, TrainConfig
from duotok.tokenizer.common.errors import ConfigError, DataError, DuoTokError


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


def rows_of(folder) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


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
    for half, whole in zip(rows_of(tmp_path / "halves"), rows_of(tmp_path / "wholes"), strict=True):
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

    with pytest.raises(DataError, match="^shard 7 is damaged$"):
        run_training(make_task(draw), config(workers=1), tmp_path / "damaged")
    assert rows_of(tmp_path / "damaged")[-1]["step"] == 1
    with pytest.raises(DuoTokError, match=r"was killed at step 1; .*lower train.workers \(1\)"):
        run_training(make_task(lambda rng: os._exit(9)), config(workers=1), tmp_path / "killed")
    assert not multiprocessing.active_children()


def test_gradients_are_clipped_to_the_global_norm(tmp_path):
    def task():
        return make_task(lambda rng: {"inputs": 100 * torch.from_numpy(rng.normal(size=(4, 3))).float()})

    # AdamW hides the scale of a gradient, not its share of a longer one: its moments keep it.
    run_training(task(), config(steps=1, gradient_clip=0.5), tmp_path)
    assert rows_of(tmp_path)[0]["gradient_norm"] > 100
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
    rows, each = rows_of(tmp_path), rows_of(tmp_path / "each")
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

        def validate():
            torch.randn(3)  # uses up random numbers
            seen.append((task.objective.training, torch.is_grad_enabled(), task.objective.layer.bias.item()))
            return {"bias/averaged": task.objective.layer.bias.item()}

        task.validate = validate
        run_training(task, config(ema_decay=0.9, **changes), tmp_path / name)

    run("validated", validate_every=3, log_every=4)
    assert [(training, gradients) for training, gradients, _ in seen] == [(False, False)] * 2
    rows = rows_of(tmp_path / "validated")
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

    def measure():
        found.append(layer(torch.ones(1, 3)).dtype)
        return {"figure": 0.0}

    task.validate = measure
    run_training(task, config(steps=2, precision="bf16", validate_every=1), tmp_path / "run")
    assert found == [torch.float32] * 2
