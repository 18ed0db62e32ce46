"""Computed sizes against real tensors: parameters, AdamW's state, activations, one step of each recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes import size
from duotok.recipes.sizing import memory, step
from duotok.recipes.sizing.dry_recipe import DryRecipe, Scale, open_recipe
from duotok.recipes.sizing.memory import PartSize, count_modules, count_parts, state_bytes
from duotok.tokenizer.common.errors import ConfigError

RECIPES = Path(size.__file__).parent
TRAINED = (
    "tokenizer/stage1",
    "tokenizer/stage2",
    "tokenizer/stage3",
    "lm",
    "renderer/diffusion",
)
TEXT_TOKENS = 40


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def open_tiny(recipe: str) -> DryRecipe:
    # A lyric head where the recipe has one to make.
    overrides = ["text=stand-in"] if recipe == "tokenizer/stage2" else []
    return open_recipe(RECIPES / recipe / "tiny.yaml", overrides, text_tokens=TEXT_TOKENS)


def whole(recipe: DryRecipe) -> PartSize:
    return sum(count_parts(recipe).values(), PartSize())


@pytest.mark.parametrize("name", TRAINED)
def test_counts_and_state_are_those_of_a_model_that_took_a_step(name: str, tmp_path: Path):
    recipe = open_tiny(name)
    task = recipe.make_task(recipe.scale, tmp_path)
    parameters = [p for p in task.objective.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters)
    task.objective.train()(**task.make_batch(np.random.default_rng(0)))["total"].backward()
    for parameter in parameters:  # one that this batch did not reach has a gradient of zero
        parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
    optimizer.step()
    found = count_parts(recipe)
    assert found == count_modules(task.objective)
    state = state_bytes(sum(found.values(), PartSize()), precision="fp32", zero=0, devices=1)
    everything = list(task.objective.parameters())
    assert state.weights == sum(p.numel() * p.element_size() for p in everything)
    assert state.gradients == sum(
        p.grad.numel() * p.grad.element_size() for p in parameters if p.grad is not None
    )
    moments = [t for s in optimizer.state.values() for key, t in s.items() if key.startswith("exp_avg")]
    assert state.optimizer == sum(t.numel() * t.element_size() for t in moments) > 0
    assert state.buffers == sum(b.numel() * b.element_size() for b in task.objective.buffers())


@pytest.mark.parametrize(
    ("name", "precision"), [("tokenizer/stage2", "fp32"), *((name, "bf16") for name in TRAINED[2:])]
)
def test_activations_scale_to_deeper_longer_and_more(name: str, precision: str):
    recipe = open_tiny(name)
    first = memory.MEASURED_BLOCKS[0]
    growth = memory.measure_growth(recipe, precision)
    scale = Scale(blocks=first + 3, batch_size=6, seconds=2 * recipe.scale.seconds)
    per_second = growth.first.per_example + 3 * growth.block.per_example
    expected = growth.first.fixed + 3 * growth.block.fixed + 6 * scale.seconds * per_second
    # Lyrics differ in length, and attention masks grow with the square of the length.
    assert memory.measure_scale(recipe, scale, precision) == pytest.approx(expected, rel=0.03)


def test_half_precision_keeps_less():
    recipe = open_tiny("lm")
    kept = {p: memory.estimate_activations(recipe, p).per_example for p in ("fp32", "bf16")}
    assert 0.4 * kept["fp32"] < kept["bf16"] < 0.9 * kept["fp32"]


def test_recomputed_blocks_keep_less():
    plain = open_tiny("lm")
    path = RECIPES / "lm" / "tiny.yaml"
    again = open_recipe(path, ["model.gradient_checkpointing=true", "model.layers=8"])
    deep = open_recipe(path, ["model.layers=8"])
    assert plain.without_recomputation() is None
    kept = {recipe: memory.estimate_activations(recipe, "fp32").per_example for recipe in (again, deep)}
    assert kept[again] < 0.6 * kept[deep]


def test_zero_shards_optimizer_gradients_and_weights_in_turn():
    part = PartSize(trainable=1000, frozen=100, buffer_bytes=8)
    states = [state_bytes(part, precision="bf16", zero=zero, devices=4) for zero in range(4)]
    assert [s.optimizer for s in states] == [12_000, 3000, 3000, 3000]
    assert [s.gradients for s in states] == [2000, 2000, 500, 500]
    assert [s.weights for s in states] == [2200, 2200, 2200, 550]
    assert states[0].total == 2200 + 2000 + 12_000 + 8
    full = [state_bytes(part, precision="fp32", zero=zero, devices=4).optimizer for zero in range(4)]
    assert full == [8000, 3000, 3000, 3000]
    averaged = state_bytes(part, precision="fp32", zero=0, devices=4, averaged=True)
    assert averaged.total == 4400 + 4000 + 8000 + 4000 + 8
    with pytest.raises(ConfigError, match="zero"):
        state_bytes(part, precision="fp32", zero=4, devices=1)
    with pytest.raises(ConfigError, match="precision"):
        state_bytes(part, precision="fp8", zero=0, devices=1)


def test_lyric_and_mask_heads_are_counted_where_they_are():
    parts = {name: count_parts(open_tiny(name)) for name in ("tokenizer/stage1", "tokenizer/stage2")}
    assert "tokenizer.text_head" not in parts["tokenizer/stage1"]
    dim = open_tiny("tokenizer/stage2").tokenizer_config.dim
    assert parts["tokenizer/stage2"]["tokenizer.text_head"].trainable == (dim + 1) * (TEXT_TOKENS + 1)
    assert parts["tokenizer/stage2"]["tokenizer.mask_head"].trainable > 0


def test_base_is_the_papers_size():
    recipes = {name: open_recipe(RECIPES / name / "base.yaml") for name in ("tokenizer/stage1", "lm")}
    tokenizer = whole(recipes["tokenizer/stage1"])
    assert 2 * recipes["tokenizer/stage1"].scale.blocks == 24
    assert 3.0e8 < tokenizer.trainable + tokenizer.frozen < 3.5e8
    assert 0.9e9 < whole(recipes["lm"]).trainable < 1.1e9


@pytest.mark.parametrize("name", TRAINED)
def test_one_bf16_step_is_saved_and_read_back(name: str, tmp_path: Path):
    figures = step.take_step(open_tiny(name), seconds=1.0, batch=2, work=tmp_path)
    assert np.isfinite(figures["loss"]) and figures["step_seconds"] > 0
    assert list(tmp_path.iterdir()) == []


def test_the_command_prints_markdown_and_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture):
    recipe = RECIPES / "lm" / "tiny.yaml"
    out = tmp_path / "size.json"
    assert size.main([str(recipe), "--devices", "2", "--out", str(out), "--step"]) == 0
    (row,) = json.loads(out.read_text())
    assert row["trainable"] == sum(part["trainable"] for part in row["parts"].values()) > 0
    assert row["step"]["peak_memory_gb"] > 0.1
    text = capsys.readouterr().out
    assert f"**{row['trainable']:,}**" in text and "| one bf16 step of |" in text


def test_a_recipe_of_another_kind_is_one_clear_line(capsys: pytest.CaptureFixture, tmp_path: Path):
    assert size.main([str(RECIPES / "renderer" / "train_spectral_vae" / "tiny.yaml")]) == 1
    message = capsys.readouterr().err.strip()
    assert "duotok.recipes.lm.train" in message and "\n" not in message
    assert size.main([str(tmp_path / "nowhere.yaml")]) == 1
    assert "nowhere.yaml" in capsys.readouterr().err
    orphan = tmp_path / "orphan.yaml"
    orphan.write_text((RECIPES / "lm" / "tiny.yaml").read_text())
    assert size.main([str(orphan)]) == 1
    assert "orphan.yaml" in capsys.readouterr().err
