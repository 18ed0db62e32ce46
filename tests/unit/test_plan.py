"""Operations of a step against torch's count, and the plan of a full run against sums done by hand."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective
from duotok.recipes import plan
from duotok.recipes.lm.data import DataConfig, WindowSource
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.recipes.sizing.dry_recipe import LMRecipe, open_recipe
from duotok.recipes.sizing.flops import batch_flops, batch_tokens, mean_flops_and_tokens
from duotok.recipes.sizing.memory import Activations, PartSize, count_parts
from duotok.recipes.sizing.run_plan import Cluster, checkpoint_bytes, plan_run
from duotok.recipes.training.loop import run_training
from duotok.tokenizer.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RECIPES = Path(plan.__file__).parent
TINY = RECIPES / "lm" / "tiny.yaml"
SIZES = {"vocal": 40, "accompaniment": 56}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    folder = tmp_path_factory.mktemp("tokens")
    index = TokenIndex(tokenizer_fingerprint="x", codebook_sizes=SIZES, frame_rate_hz=25.0)
    codes = {track: torch.randint(size, (200,)) for track, size in SIZES.items()}
    append_shard(folder, index, {"item": ("song", "train", codes)})
    return TokenShards(folder)


def make_lm() -> DualTrackLM:
    sizes = {f"{track}_codes": size for track, size in SIZES.items()}
    widths = dict(code_dim=12, embedding_dim=24, hidden_dim=48, heads=4, key_value_heads=2)
    return DualTrackLM(DualTrackLMConfig(**sizes, **widths, layers=3, feed_forward_dim=80))


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_operations_are_those_that_torch_counts(mode: str, prompt_weight: float, shards: TokenShards) -> None:
    lm = make_lm()
    data = DataConfig(tokens="", windows=((1.6, 1.0),), **{name: float(name == mode) for name in MODES})
    batch = WindowSource(shards, data, lm, batch_size=2).make_batch(np.random.default_rng(0))
    counter = FlopCounterMode(display=False)
    # The fused attention of CPUs is not among the operations that torch counts.
    with counter, sdpa_kernel(SDPBackend.MATH):
        LMObjective(lm, prompt_weight)(**batch)["total"].backward()
    assert batch_flops(lm.config, batch, prompt_weight) == counter.get_total_flops()
    assert batch_tokens(batch) == 2 * 2 * 40


def test_means_over_modes_and_lengths_are_those_of_many_batches(shards: TokenShards) -> None:
    lm = make_lm()
    data = DataConfig(tokens="", windows=((0.8, 1), (1.6, 3)), unconditional=1, accompaniment_to_vocal=1)
    source = WindowSource(shards, data, lm, batch_size=3)
    batches = [source.make_batch(np.random.default_rng(seed)) for seed in range(200)]
    flops, tokens = mean_flops_and_tokens(lm.config, data, batch_size=3, rate_hz=25.0, prompt_weight=0.0)
    assert np.mean([batch_flops(lm.config, batch) for batch in batches]) == pytest.approx(flops, rel=0.1)
    assert np.mean([batch_tokens(batch) for batch in batches]) == pytest.approx(tokens, rel=0.1)


def make_plan(cluster: Cluster, *, tokens: float | None = None, kept_gb: float = 1.0, path: Path = TINY):
    recipe = open_recipe(path)
    activations = Activations(per_example=kept_gb * 1e9, fixed=0.0)
    return plan_run(recipe, count_parts(recipe), activations, cluster, precision="fp32", tokens=tokens)


def test_a_plan_adds_up() -> None:
    # 8 windows of 1 s, or 4 of 2 s, a device. 1 GB each: of 3.5 GB two of 2 s fit, so four of 1 s.
    cluster = Cluster(devices=6, devices_per_node=4, device_gb=5, reserved_share=0.3, peak_tflops=2, mfu=0.25)
    found = make_plan(cluster, tokens=1e6)
    assert (found.micro_batch, found.accumulate, cluster.nodes) == (4, 2, 2)
    assert found.activations_gb == 2.0
    assert found.tokens_per_step == pytest.approx(6 * 8 * 25 * 2)  # devices, windows, frames, tracks
    assert found.steps == round(1e6 / 2400) and found.hours_of_music == pytest.approx(1e6 / 50 / 3600)
    assert found.tokens_per_second * found.flops_per_token == pytest.approx(6 * 0.25 * 2e12)
    assert found.days == pytest.approx(found.steps * 2400 / found.tokens_per_second / 86_400)
    assert found.shard_gb == pytest.approx(1e6 * 4 / 1e9)
    assert make_plan(cluster).steps == found.recipe_steps == 20
    # fp32 gradients and weights once each, but for the share that a device holds itself.
    assert found.traffic_gb == pytest.approx(5 / 6 * 2 * 4 * found.parameters / 1e9)
    one = make_plan(Cluster(devices=1, peak_tflops=1, mfu=0.5))
    two = make_plan(Cluster(devices=2, peak_tflops=1, mfu=0.5))
    assert two.days == pytest.approx(one.days) and two.tokens == pytest.approx(2 * one.tokens)
    with pytest.raises(ConfigError, match="gradient_checkpointing"):
        make_plan(cluster, kept_gb=4.0)
    with pytest.raises(ConfigError, match="duotok.recipes.lm.train"):
        make_plan(cluster, path=RECIPES / "tokenizer" / "stage1" / "tiny.yaml")


def test_a_checkpoint_is_as_large_as_planned(tmp_path: Path) -> None:
    recipe = open_recipe(TINY, ["train.steps=1", "model.hidden_dim=256"])
    task = recipe.make_task(recipe.scale, tmp_path / "data")
    run_training(task, recipe.train, tmp_path / "run")
    size = sum(p.stat().st_size for p in (tmp_path / "run" / "checkpoint").iterdir())
    whole = sum(count_parts(recipe).values(), PartSize())
    assert size == pytest.approx(checkpoint_bytes(whole, "fp32", 0, averaged=False), rel=0.03)
    # ZeRO: bf16 weights, and fp32 weights and two moments in the optimizer.
    assert checkpoint_bytes(PartSize(trainable=10), "bf16", 1, averaged=False) == 140


def run(*options: object) -> int:
    start = ["--devices", 2, "--peak-tflops", 1, "--activations-gb", 0.01]
    return plan.main([str(option) for option in (TINY, *start, *options)])


def test_the_command_writes_a_page_that_says_how_it_was_made(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "docs" / "plan.md"
    assert run("--mfu", 0.4, "--hours", 2, "--zero", 2, "--out", out) == 0
    page = out.read_text()
    assert page in capsys.readouterr().out
    assert f"python -m duotok.recipes.plan {TINY} --devices 2" in page and "**ZeRO 2**" in page
    assert "| tokens | 3.6e+05 " in page and "| hours that the run sees, repetitions included | 2 |" in page
    assert "--deepspeed recipes/lm/deepspeed/zero2.json" in page and "## Assumptions" in page


def test_utilization_comes_from_a_log(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"step": n, "total": 1.0, "mfu": mfu} for n, mfu in enumerate((0.01, 0.02, 0.2, 0.3, 0.21), 1)]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("--run", tmp_path) == 0
    assert "utilization 0.21 (median of the second half" in capsys.readouterr().out
    (tmp_path / "log.jsonl").write_text(json.dumps({"step": 1, "total": 1.0}) + "\n")
    assert run("--run", tmp_path) == 1
    assert "has logged no mfu" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--mfu", 40), "--mfu must be above 0 and at most 1"),
        (("--mfu", 0.4, "--zero", 4), "--zero must be one of"),
        (("--mfu", 0.4, "--tokens", 0), "more than 0 tokens"),
        (("--run", "nowhere"), "nowhere"),
    ],
)
def test_bad_input_is_one_line(options: tuple, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*options) == 1
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_page_in_docs_is_what_its_command_computes() -> None:
    page = (ROOT / "docs" / "full-run.md").read_text(encoding="utf-8")
    (command,) = [line.strip() for line in page.splitlines() if line.startswith("    python -m")]
    assert command.startswith("python -m duotok.recipes.plan recipes/lm/base.yaml --devices 64 ")
    recipe = open_recipe(RECIPES / "lm" / "base.yaml")
    assert isinstance(recipe, LMRecipe)
    parts = count_parts(recipe)
    assert f"| parameters | **{sum(part.trainable for part in parts.values()):,}** |" in page
    cluster = Cluster(devices=64, peak_tflops=989, mfu=0.4)
    activations = Activations(per_example=1e9, fixed=0.0)
    found = plan_run(recipe, parts, activations, cluster, precision="bf16")
    assert f"| tokens per step | {found.tokens_per_step:,.0f} |" in page
    assert f"| tokens per second | {found.tokens_per_second:,.0f} |" in page
    assert f"**{found.days:.2f}**" in page
    for zero, state in found.states.items():
        assert f"ZeRO {zero}" in page and f"{state.weights / 1e9:.2f} |" in page
