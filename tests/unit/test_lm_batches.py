"""Training batches of the language model: what they show, what they depend on, what is held out."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import LMObjective, count_loss_parts
from duotok.recipes.lm import train as validation
from duotok.recipes.lm.data import CodeDropout, DataConfig, WindowSource
from duotok.recipes.lm.tokens import TokenIndex, TokenShards, TokenSong, append_shard, split_songs
from duotok.recipes.lm.train import ValidationConfig, batch_flops, make_validation
from duotok.tokenizer.common.errors import ConfigError, DataError

SIZES = {"vocal": 11, "accompaniment": 13}


def make_lm(vocal_codes: int = 11, accompaniment_codes: int = 13) -> DualTrackLM:
    settings = dict(vocal_codes=vocal_codes, accompaniment_codes=accompaniment_codes, code_dim=4)
    settings |= dict(embedding_dim=8, hidden_dim=16, layers=1, heads=2, key_value_heads=1)
    return DualTrackLM(DualTrackLMConfig(**settings, feed_forward_dim=16))


def test_a_batch_is_a_function_of_the_generator(tmp_path: Path, make_shards) -> None:
    config = DataConfig(
        tokens="",
        windows=((0.4, 1), (1.2, 1)),
        accompaniment_to_vocal=1,
        unconditional=1,
        history_dropout=CodeDropout(probability=0.5),
    )
    source = WindowSource(make_shards(tmp_path), config, make_lm(), batch_size=6)
    sizes = set()
    for seed in range(12):
        one, two = (source.make_batch(np.random.default_rng(seed)) for _ in range(2))
        assert all(torch.equal(one[name], two[name]) for name in one)
        sizes.add(tuple(one["target_vocal"].shape))
        losses = LMObjective(make_lm())(**one)
        assert torch.isfinite(losses["total"])
    assert sizes == {(6, 10), (2, 30)}  # longer windows come in fewer examples


def test_batches_do_not_depend_on_how_songs_lie_in_shards(tmp_path: Path, make_shards) -> None:
    config = DataConfig(tokens="", windows=((0.4, 1), (1.2, 1)))
    batches = []
    for name, layout in (("two", ((0, (30, 60)), (2, (90,)))), ("one", ((0, (30, 60, 90)),))):
        shards = make_shards(tmp_path / name, layout)
        assert shards.index.shards == len(layout)
        source = WindowSource(shards, config, make_lm(), batch_size=6)
        batches.append(source.make_batch(np.random.default_rng(3)))
    assert all(torch.equal(batches[0][name], batches[1][name]) for name in batches[0])


def test_songs_are_held_out_whole_and_for_good() -> None:
    def song(number: int, part: int) -> TokenSong:
        place = dict(split="train", shard=0, start=0, frames=1)
        return TokenSong(id=f"{number}-{part}", song=f"song {number}", **place)

    songs = [song(number, part) for number in range(1000) for part in range(2)]
    trained, held_out = split_songs(songs, 0.1)
    assert len(trained) + len(held_out) == len(songs)
    assert not {s.song for s in trained} & {s.song for s in held_out}
    assert 0.07 < len(held_out) / len(songs) < 0.13
    # A song's side does not depend on which others there are, and a larger share keeps what a smaller held.
    assert split_songs(songs[:100], 0.1)[1] == [s for s in held_out if s in songs[:100]]
    assert {s.id for s in held_out} < {s.id for s in split_songs(songs, 0.2)[1]}
    assert split_songs(songs, 0.0) == (songs, [])


def make_named_shards(folder: Path, songs: int, first: int = 0) -> TokenShards:
    """Two items of 40 frames a song; every song has a pair of codes of its own."""
    index = TokenIndex(tokenizer_fingerprint="x", codebook_sizes=dict.fromkeys(SIZES, 64), frame_rate_hz=25.0)
    codes = {n: {track: torch.full((40,), n) for track in SIZES} for n in range(first, first + songs)}
    append_shard(folder, index, {f"{n}-{p}": (f"song {n}", "train", codes[n]) for n in codes for p in (0, 1)})
    return TokenShards(folder)


def test_training_never_draws_what_validation_measures(tmp_path: Path, monkeypatch) -> None:
    shards, lm = make_named_shards(tmp_path, songs=40), make_lm(64, 64)
    config = DataConfig(tokens="", windows=((0.8, 1.0),), hold_out=0.25)
    source = WindowSource(shards, config, lm, batch_size=300)
    trained = set(source.make_batch(np.random.default_rng(0))["target_vocal"][:, 0].tolist())
    held_out = {int(s.song.split()[1]) for s in split_songs(shards.index.songs, 0.25)[1]}
    assert trained == set(range(40)) - held_out and len(held_out) > 3
    shown = []

    def score(lm, vocal, *rest, **options):
        shown.append(vocal)
        return score_batch(lm, vocal, *rest, **options)

    score_batch = validation.score_batch
    monkeypatch.setattr(validation, "score_batch", score)
    lm.train()
    validate = make_validation(
        lm, shards, config, ValidationConfig(windows=len(held_out), prefix_seconds=0.2)
    )
    assert validate is not None
    figures = {name: total / count for name, (total, count) in validate(0, 1).items()}
    assert {int(row[0]) for row in shown[0]} == held_out  # a window of each before a second one of any
    assert shown[0].shape == (len(held_out), 20)
    assert validate(0, 1) == validate(0, 1) and lm.training
    # Shares of three processes are as many windows each, and together what one process finds.
    shown.clear()
    shares = [validate(process, 3) for process in range(3)]
    assert {part.shape[0] for part in shown} == {-(-len(held_out) // 3)}
    for name, value in figures.items():
        total, count = (sum(each) for each in zip(*(share[name] for share in shares), strict=True))
        assert total / count == pytest.approx(value, rel=1e-6)
    assert set(figures) == {
        "cnbpt/unconditional_vocal",
        "cnbpt/unconditional_accompaniment",
        "cnbpt/vocal_to_accompaniment",
    }
    assert all(0.8 < value < 1.3 for value in figures.values())


def test_validation_of_a_uniform_guess_is_one(tmp_path: Path) -> None:
    shards, lm = make_named_shards(tmp_path / "a", songs=4), make_lm(64, 64)
    other = make_named_shards(tmp_path / "b", songs=3, first=10)
    for track in SIZES:
        for parameter in (lm.codes_of(track).anchor_out.weight, lm.codes_of(track).residual_out.weight):
            torch.nn.init.zeros_(parameter)
    data = DataConfig(tokens="", windows=((0.8, 1.0),))
    assert make_validation(lm, shards, data, ValidationConfig()) is None
    config = ValidationConfig(tokens=str(other.folder), seconds=1.2, prefix_seconds=0.2)
    validate = make_validation(lm, shards, data, config)
    assert validate is not None
    assert [total / count for total, count in validate(0, 1).values()] == pytest.approx([1.0, 1.0, 1.0])
    with pytest.raises(DataError, match="song 0 is in .* and is trained on"):
        make_validation(lm, shards, data, ValidationConfig(tokens=str(shards.folder), prefix_seconds=0.2))
    with pytest.raises(DataError, match="raise data.hold_out"):
        config = ValidationConfig(prefix_seconds=0.2)
        make_validation(lm, shards, DataConfig(tokens="", windows=((0.8, 1.0),), hold_out=1e-9), config)
    with pytest.raises(ConfigError, match="prefix_seconds"):
        ValidationConfig(seconds=1.0)


def test_what_a_batch_shows(tmp_path: Path, make_shards) -> None:
    lm = make_lm()
    config = DataConfig(tokens="", windows=((1.2, 1),), no_prefix=0.5, prefix_seconds=0.4, source_dropout=0.3)
    source = WindowSource(make_shards(tmp_path), config, lm, batch_size=400)
    batch = source.make_batch(np.random.default_rng(0))
    shown = batch["vocal"][:, :30]
    dropped = (shown == lm.pads["vocal"]).all(dim=1)
    assert dropped.float().mean().item() == pytest.approx(0.3, abs=0.07)
    assert torch.equal(shown[~dropped], batch["target_vocal"][~dropped])
    assert (batch["weight_vocal"] == 0).all()
    prefixes = 30 - batch["weight_accompaniment"].sum(dim=1)
    assert (prefixes == 0).float().mean().item() == pytest.approx(0.5, abs=0.08)
    assert prefixes.max() == 10
    # Undamaged past: the target's codes one frame late.
    assert torch.equal(batch["accompaniment"][:, 31:], batch["target_accompaniment"][:, :-1])


def draw_batch(shards: TokenShards, lm: DualTrackLM, **dropout: CodeDropout) -> dict[str, torch.Tensor]:
    """A batch of 200 windows of 30 frames, no source left out."""
    config = DataConfig(tokens="", windows=((1.2, 1),), source_dropout=0.0, **dropout)
    return WindowSource(shards, config, lm, batch_size=200).make_batch(np.random.default_rng(0))


def test_history_dropout_damages_the_past_only(tmp_path: Path, make_shards) -> None:
    lm = make_lm()
    history = CodeDropout(probability=1.0, lowest=0.4, highest=0.4, random_share=0.5)
    batch = draw_batch(make_shards(tmp_path), lm, history_dropout=history)
    past, true = batch["accompaniment"][:, 31:], batch["target_accompaniment"][:, :-1]
    assert (past == lm.pads["accompaniment"]).float().mean().item() == pytest.approx(0.2, abs=0.03)
    # Of the codes replaced by random ones, one in 13 happens to be the right one.
    assert (past != true).float().mean().item() == pytest.approx(0.2 + 0.2 * 12 / 13, abs=0.03)
    assert torch.equal(batch["vocal"][:, :30], batch["target_vocal"])
    assert int(batch["target_accompaniment"].max()) < 13


def test_source_code_dropout_damages_the_source_only(tmp_path: Path, make_shards) -> None:
    lm = make_lm()
    dropout = CodeDropout(probability=1.0, lowest=0.3, highest=0.3, random_share=0.0)
    batch = draw_batch(make_shards(tmp_path), lm, source_code_dropout=dropout)
    prompt, beside = batch["vocal"][:, :30], batch["vocal"][:, 30:]
    assert torch.equal(prompt, beside)  # the frames that are lost are lost everywhere
    lost = prompt == lm.pads["vocal"]
    assert lost.float().mean().item() == pytest.approx(0.3, abs=0.03)
    assert torch.equal(prompt[~lost], batch["target_vocal"][~lost])
    assert torch.equal(batch["accompaniment"][:, 31:], batch["target_accompaniment"][:, :-1])


def test_errors_name_the_setting(tmp_path: Path, make_shards) -> None:
    with pytest.raises(DataError, match="lower data.windows"):
        config = DataConfig(tokens="", windows=((30.0, 1.0),))
        WindowSource(make_shards(tmp_path), config, make_lm(), batch_size=2)
    for changes in ({"windows": ()}, {"no_prefix": 1.5}, {"prefix_seconds": -1.0}, {"hold_out": 1.0}):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            DataConfig(tokens="", **changes)
    with pytest.raises(ConfigError, match="code dropout: probability"):
        CodeDropout(probability=2.0)
    with pytest.raises(ConfigError, match="code dropout: lowest"):
        CodeDropout(lowest=0.5, highest=0.4)


def test_the_prompt_loss_asks_the_prompt_steps_for_the_target() -> None:
    lm = make_lm()
    codes = {track: torch.randint(0, 8, (2, 6)) for track in ("vocal", "accompaniment")}
    weights = {"weight_vocal": torch.zeros(2, 6), "weight_accompaniment": torch.ones(2, 6)}
    targets = {f"target_{track}": value for track, value in codes.items()}
    losses = {}
    for mode in ("vocal_to_accompaniment", "unconditional"):
        layout = lm.lay_out(codes, mode)
        steps = layout.tensors()
        losses[mode] = LMObjective(lm, prompt_weight=0.5)(**steps, **targets, **weights)
        plain = LMObjective(lm)(**steps, **targets, **weights)["total"]
        added = losses[mode].get("accompaniment_prompt_nats", torch.tensor(0.0))
        assert torch.allclose(losses[mode]["total"], plain + 0.5 * added)
    assert "accompaniment_prompt_nats" not in losses["unconditional"]
    for mode, found in losses.items():
        assert found[f"accompaniment_nats/{mode}"] == found["accompaniment_nats"]
        assert [name for name in found if "/" in name] == [f"accompaniment_nats/{mode}"]
    # What the prompt says of a frame cannot depend on the target's codes: they are PAD there.
    moved = {**codes, "accompaniment": (codes["accompaniment"] + 1) % 8}
    layout = lm.lay_out(moved, "vocal_to_accompaniment")
    steps = layout.tensors()
    other = LMObjective(lm, prompt_weight=0.5)(**steps, **targets, **weights)
    first = losses["vocal_to_accompaniment"]
    assert torch.allclose(other["accompaniment_prompt_nats"], first["accompaniment_prompt_nats"])
    assert not torch.allclose(other["accompaniment_nats"], first["accompaniment_nats"])


@pytest.mark.parametrize("prompt_weight", [0.0, 0.5])
@pytest.mark.parametrize("mode", MODES)
def test_operations_are_those_that_torch_counts(mode: str, prompt_weight: float, tmp_path: Path) -> None:
    sizes = {f"{track}_codes": 64 for track in SIZES}
    widths = dict(code_dim=12, embedding_dim=24, hidden_dim=48, heads=4, key_value_heads=2)
    lm = DualTrackLM(DualTrackLMConfig(**sizes, **widths, layers=3, feed_forward_dim=80))
    data = DataConfig(tokens="", windows=((1.2, 1.0),), **{name: float(name == mode) for name in MODES})
    batch = WindowSource(make_named_shards(tmp_path, songs=2), data, lm, batch_size=2).make_batch(
        np.random.default_rng(0)
    )
    counter = FlopCounterMode(display=False)
    # The fused attention of CPUs is not among the operations that torch counts.
    with counter, sdpa_kernel(SDPBackend.MATH):
        LMObjective(lm, prompt_weight)(**batch)["total"].backward()
    assert batch_flops(lm.config, batch, prompt_weight) == counter.get_total_flops()


def test_a_loss_in_parts_is_the_same_and_keeps_no_logits(tmp_path: Path) -> None:
    lm = make_lm(64, 64)
    data = DataConfig(tokens="", windows=((0.8, 1.0), (1.6, 1.0)))
    source = WindowSource(make_named_shards(tmp_path, songs=2), data, lm, batch_size=3)
    batch = source.make_batch(np.random.default_rng(0))
    assert source.most_frames == 60 >= batch["target_vocal"].numel()
    found = []
    for parts in (1, 7):
        kept: list[int] = []
        lm.zero_grad()
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            losses = LMObjective(lm, 0.5, loss_parts=parts)(**batch)
        losses["total"].backward()
        gradients = {n: p.grad for n, p in lm.named_parameters() if p.requires_grad and p.grad is not None}
        found.append((losses, gradients, max(kept)))
    (whole, expected, most), (parted, gradients, fewer) = found
    assert whole.keys() == parted.keys() and expected.keys() == gradients.keys()
    for one, other in ((whole, parted), (expected, gradients)):
        for name, value in one.items():
            torch.testing.assert_close(other[name], value, rtol=1e-5, atol=1e-6)
    logits = batch["target_vocal"].numel() * 64
    assert fewer < logits <= most
    assert count_loss_parts(12 * 125, 3600) == 1 and count_loss_parts(8 * 750, 32_768) == 6
