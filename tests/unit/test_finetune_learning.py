"""Fine-tuning on made-up songs: one is learned by heart, the best held-out weights stay, resume is exact;
adapters start as no change and merge without one; the new model's place and precision."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from duotok.lm.dual_track.layout import TRACKS
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective, score_batch
from duotok.recipes.finetuning import learning
from duotok.recipes.finetuning.finetune_settings import FinetuneSettings
from duotok.recipes.finetuning.learning import (
    TARGETS,
    Curve,
    LossMeter,
    add_adapters,
    choose_held_out,
    is_half,
    learn,
    merge_adapters,
    open_windows,
    require_free,
    write_model,
)
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, append_shard
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

CODES = 16
FRAMES = 50


def make_song(seed: int, frames: int = FRAMES) -> dict[str, Tensor]:
    """The band plays the sung code and its neighbour in turn; each song has its own interval."""
    generator = torch.Generator().manual_seed(seed)
    vocal = torch.randint(CODES, (frames // 2,), generator=generator).repeat_interleave(2)
    return {"vocal": vocal, "accompaniment": (vocal + seed + torch.arange(frames) % 2) % CODES}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> TokenShards:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("finetune") / "tokens"
    sizes = {"vocal": CODES, "accompaniment": CODES}
    index = TokenIndex(tokenizer_fingerprint="made-up", codebook_sizes=sizes, frame_rate_hz=25.0)
    append_shard(folder, index, {f"{n}-000": (f"song {n}", "train", make_song(n)) for n in range(6)})
    return TokenShards(folder)


@pytest.fixture
def lm(monkeypatch: pytest.MonkeyPatch) -> DualTrackLM:
    monkeypatch.setattr(learning, "WINDOWS", ((1.0, 1.0), (2.0, 1.0)))
    torch.manual_seed(0)
    config = DualTrackLMConfig(
        vocal_codes=CODES, accompaniment_codes=CODES, code_dim=8, embedding_dim=32, hidden_dim=64, layers=2,
        heads=2, key_value_heads=1, feed_forward_dim=128,
    )  # fmt: skip
    model = DualTrackLM(config)
    for track in ("vocal", "accompaniment"):  # heads as a trained model has them, so that adapters can tell
        torch.nn.init.normal_(model.codes_of(track).residual_out.weight, std=0.3)
    return model


def state_of(lm: DualTrackLM) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in lm.state_dict().items()}


def test_one_song_is_learned_by_heart_with_adapters(shards: TokenShards, lm: DualTrackLM, tmp_path: Path):
    song = shards.index.songs[:1]
    meter = LossMeter(shards, song)
    before = meter.measure(lm)
    frozen = state_of(lm)
    add_adapters(lm, rank=16)
    settings = FinetuneSettings(lora_rank=16, learning_rate=1e-2, steps=150, batch_size=8)
    learned = learn(lm, open_windows(lm, shards, song, 8), None, settings, tmp_path / "run")
    merge_adapters(lm)
    assert learned.steps == learned.kept_step == 150 and not learned.stopped_early and learned.curve == []
    assert meter.measure(lm) < 0.1 * before
    after = state_of(lm)
    changed = {name for name in frozen if not torch.equal(frozen[name], after[name])}
    assert changed and all(name.startswith("backbone.layers.") for name in changed)


def test_the_lowest_held_out_loss_is_kept_and_ends_the_training(
    shards: TokenShards, lm: DualTrackLM, tmp_path: Path, capsys: pytest.CaptureFixture
):
    """The held-out song has another interval, so learning one song by heart must hurt it in the end."""
    held_out = LossMeter(shards, shards.index.songs[3:4])
    settings = FinetuneSettings(learning_rate=2e-2, steps=400, batch_size=4, measure_every=5, patience=3)
    windows = open_windows(lm, shards, shards.index.songs[:1], 4)
    learned = learn(lm, windows, held_out, settings, tmp_path / "run")
    steps, losses = map(list, zip(*learned.curve, strict=True))
    assert learned.stopped_early and steps == list(range(0, learned.steps + 1, 5))
    assert losses.index(min(losses)) == len(losses) - 4 and learned.kept_step == learned.steps - 15
    assert held_out.measure(lm) == pytest.approx(min(losses), abs=1e-6)
    assert f"after {learned.kept_step} steps: {min(losses):.4f}" in capsys.readouterr().err


def test_interrupted_anywhere_gives_the_same_weights(
    shards: TokenShards, lm: DualTrackLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    start, forward = state_of(lm), LMObjective.forward
    held_out = LossMeter(shards, shards.index.songs[3:4])
    settings = FinetuneSettings(learning_rate=1e-3, steps=9, batch_size=2, measure_every=4)
    steps_taken, stop_at = 0, 0

    def count(self: LMObjective, **batch: Tensor) -> dict[str, Tensor]:
        nonlocal steps_taken
        steps_taken += 1
        if steps_taken == stop_at:
            raise KeyboardInterrupt
        return forward(self, **batch)

    monkeypatch.setattr(LMObjective, "forward", count)

    def run(folder: Path) -> tuple[dict[str, Tensor], list[tuple[int, float]]]:
        lm.load_state_dict(start)  # another process begins from the bundle
        windows = open_windows(lm, shards, shards.index.songs[:3], 2)
        curve = learn(lm, windows, held_out, settings, folder).curve
        return state_of(lm), curve

    whole, whole_curve = run(tmp_path / "whole")
    assert [step for step, _ in whole_curve] == [0, 4, 8, 9] and steps_taken == 9
    steps_taken = 0
    for stop in (3, 9):  # before the first checkpoint, and between two
        stop_at = stop
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "parts")
    parts, parts_curve = run(tmp_path / "parts")
    assert steps_taken == 3 + 6 + 5  # the third run goes on from the checkpoint after 4 steps
    assert parts_curve == whole_curve
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    again, curve = run(tmp_path / "parts")  # a finished run is only read
    assert curve == whole_curve and all(torch.equal(whole[name], again[name]) for name in whole)


def test_the_loss_is_of_the_accompaniment_over_whole_windows(shards: TokenShards, lm: DualTrackLM):
    lm.eval()
    losses = []
    for song in shards.index.songs[:2]:
        codes = shards.codes(song)
        scores = score_batch(lm, codes["vocal"][None], codes["accompaniment"][None], "vocal_to_accompaniment")
        losses.append(float(scores.loss_nats["accompaniment"].mean()))
    lm.train()
    assert LossMeter(shards, shards.index.songs[:2]).measure(lm) == pytest.approx(sum(losses) / 2, rel=1e-5)
    assert lm.training
    assert LossMeter(shards, shards.index.songs[:2], most_windows=1).measure(lm) == pytest.approx(losses[0])


def test_windows_that_no_song_has_are_not_drawn(shards: TokenShards, lm: DualTrackLM, monkeypatch):
    monkeypatch.setattr(learning, "WINDOWS", ((1.0, 1.0), (30.0, 5.0)))
    windows = open_windows(lm, shards, shards.index.songs[:2], 2)
    for seed in range(5):
        assert windows.make_batch(np.random.default_rng(seed))["target_vocal"].shape == (2, 25)


@pytest.mark.parametrize(
    ("count", "share", "expected"), [(3, 0.5, 0), (4, 0.01, 1), (20, 0.15, 3), (9, 0, 0)]
)
def test_held_out_songs_are_a_share_of_them(count: int, share: float, expected: int):
    names = [f"song {number}" for number in range(count)]
    held_out = choose_held_out(names * 2, share)
    assert len(held_out) == expected and held_out <= set(names)
    assert choose_held_out(names[::-1], share) == held_out


def test_the_curve_knows_its_best_and_its_end():
    curve = Curve([(0, 3.0), (5, 2.0), (10, 2.0), (15, float("nan"))])
    assert curve.best_step == 5 and curve.has(10) and not curve.has(20)
    assert curve.is_over(2) and not curve.is_over(3)
    assert not Curve().is_over(1)


def test_settings_out_of_range_are_refused():
    bad = {"lora_rank": 0, "minutes": 0.0, "held_out_share": 0.9, "steps": 0, "batch_size": 0, "seed": -1}
    for name, value in (("learning_rate", 0.0), ("learning_rate", float("nan")), *bad.items()):
        with pytest.raises(ConfigError, match="--[a-z-]+ must be "):
            replace(FinetuneSettings(), **{name: value})


@torch.no_grad()
def logits_of(lm: DualTrackLM) -> torch.Tensor:
    torch.manual_seed(1)
    codes = {track: torch.randint(CODES, (2, 20)) for track in TRACKS}
    return lm(lm.lay_out(codes, "vocal_to_accompaniment"))["accompaniment"]


def test_new_adapters_change_nothing_and_merged_ones_make_an_ordinary_model(lm: DualTrackLM):
    names = set(lm.state_dict())
    before = logits_of(lm.eval())
    add_adapters(lm, rank=4)
    torch.testing.assert_close(logits_of(lm), before)
    trained = [name for name, parameter in lm.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * len(TARGETS) * lm.config.layers
    assert all("lora_" in name and name.startswith("backbone.") for name in trained)
    for name, parameter in lm.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted = logits_of(lm)
    assert (adapted - before).abs().max() > 1e-4
    merge_adapters(lm)
    torch.testing.assert_close(logits_of(lm), adapted, rtol=1e-4, atol=1e-5)
    assert set(lm.state_dict()) == names and all(p.requires_grad for p in lm.parameters())


def test_adapters_start_alike_for_a_seed(lm: DualTrackLM):
    twin = DualTrackLM(lm.config)
    add_adapters(lm, rank=2, seed=3)
    add_adapters(twin, rank=2, seed=3)
    state, other = lm.state_dict(), twin.state_dict()
    names = [name for name in state if "lora_A" in name]
    assert names and all(torch.equal(state[name], other[name]) for name in names)


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("mine")
    for free in ("new", "empty"):
        require_free(tmp_path / free)
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already"):
            require_free(taken)


def test_a_language_model_of_another_tokenizer_makes_no_bundle(
    tiny_components: dict[str, Path], tiny_bundle: Path, tmp_path: Path, make_tiny_components
):
    assert not is_half(tiny_components["lm"]) and is_half(tiny_bundle / "lm")
    other = DualTrackLM.from_pretrained(make_tiny_components(tmp_path / "other", seed=1)["lm"])
    with pytest.raises(CheckpointError, match="was trained on the tokenizer"):
        write_model(
            tmp_path / "mine", source=tiny_bundle, lm=other, work=tmp_path, name="mine", provenance={}
        )
    assert not (tmp_path / "mine").exists()
