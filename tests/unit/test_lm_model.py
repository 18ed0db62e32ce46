"""The layout of windows and the model that reads them."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from duotok.lm.dual_track.layout import lay_out, mode_into
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.scoring import mask_source, score_batch, shift_source
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

PADS = {"vocal": 12, "accompaniment": 20}


def make_lm(**changes: object) -> DualTrackLM:
    torch.manual_seed(0)
    settings = dict(vocal_codes=12, accompaniment_codes=20, code_dim=6, embedding_dim=8, hidden_dim=16)
    settings |= dict(layers=2, heads=4, key_value_heads=2, feed_forward_dim=24)
    lm = DualTrackLM(DualTrackLMConfig(**{**settings, **changes})).eval()
    for parameter in lm.parameters():  # far from the near-uniform start, so that differences show
        torch.nn.init.normal_(parameter, std=0.3)
    return lm


def make_codes(batch: int = 2, frames: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {t: torch.randint(0, n, (batch, frames), generator=generator) for t, n in PADS.items()}


def test_vocal_to_accompaniment_layout_by_hand() -> None:
    codes = {"vocal": torch.tensor([[1, 2, 3]]), "accompaniment": torch.tensor([[7, 8, 9]])}
    layout = lay_out(codes, "vocal_to_accompaniment", pads=PADS, shared_positions=True, aligned_source=True)
    assert layout.vocal.tolist() == [[1, 2, 3, 1, 2, 3]]
    assert layout.accompaniment.tolist() == [[20, 20, 20, 20, 7, 8]]
    assert layout.position.tolist() == [[0, 1, 2, 0, 1, 2]]
    assert layout.segment.tolist() == [[0, 0, 0, 2, 2, 2]]
    assert layout.frames == 3
    plain = lay_out(codes, "vocal_to_accompaniment", pads=PADS, shared_positions=True, aligned_source=False)
    assert plain.vocal.tolist() == [[1, 2, 3, 12, 12, 12]]
    papers = lay_out(codes, "vocal_to_accompaniment", pads=PADS, shared_positions=False, aligned_source=False)
    assert papers.position.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_mirror_and_unconditional_layout_by_hand() -> None:
    codes = {"vocal": torch.tensor([[1, 2, 3]]), "accompaniment": torch.tensor([[7, 8, 9]])}
    mirror = lay_out(codes, "accompaniment_to_vocal", pads=PADS, shared_positions=True, aligned_source=True)
    assert mirror.accompaniment.tolist() == [[7, 8, 9, 7, 8, 9]]
    assert mirror.vocal.tolist() == [[12, 12, 12, 12, 1, 2]]
    free = lay_out(codes, "unconditional", pads=PADS, shared_positions=True, aligned_source=True)
    assert free.vocal.tolist() == [[12, 1, 2]]
    assert free.accompaniment.tolist() == [[20, 7, 8]]


def test_a_dropped_source_is_absent_from_prompt_and_target() -> None:
    codes = make_codes()
    drop = torch.tensor([True, False])
    layout = lay_out(
        codes,
        "vocal_to_accompaniment",
        pads=PADS,
        shared_positions=True,
        aligned_source=True,
        drop_source=drop,
    )
    assert (layout.vocal[0] == 12).all()
    assert (layout.vocal[1] != 12).all()


def test_layout_errors() -> None:
    with pytest.raises(ConfigError, match="unknown mode"):
        lay_out(make_codes(), "duet", pads=PADS, shared_positions=True, aligned_source=True)
    with pytest.raises(ConfigError, match="track must be"):
        mode_into("drums")
    with pytest.raises(ConfigError, match="cut them alike"):
        codes = {"vocal": torch.zeros(1, 3).long(), "accompaniment": torch.zeros(1, 4).long()}
        lay_out(codes, "vocal_to_accompaniment", pads=PADS, shared_positions=True, aligned_source=True)


@pytest.mark.parametrize("aligned", [True, False])
def test_every_target_frame_hears_the_whole_source(aligned: bool) -> None:
    lm, codes = make_lm(aligned_source=aligned), make_codes()
    before = lm(lm.lay_out(codes, "vocal_to_accompaniment"))["accompaniment"]
    changed = {**codes, "vocal": codes["vocal"].clone()}
    changed["vocal"][:, -1] = (changed["vocal"][:, -1] + 1) % 12
    after = lm(lm.lay_out(changed, "vocal_to_accompaniment"))["accompaniment"]
    assert ((before - after).abs().amax(dim=-1) > 1e-6).all()


@pytest.mark.parametrize("mode", ["vocal_to_accompaniment", "accompaniment_to_vocal", "unconditional"])
def test_no_frame_sees_itself_or_later_ones(mode: str) -> None:
    lm, codes = make_lm(), make_codes()
    target = "vocal" if mode == "accompaniment_to_vocal" else "accompaniment"
    before = lm(lm.lay_out(codes, mode))[target]
    changed = {**codes, target: codes[target].clone()}
    changed[target][:, 4] = (changed[target][:, 4] + 1) % PADS[target]
    after = lm(lm.lay_out(changed, mode))[target]
    moved = (before - after).abs().amax(dim=-1) > 1e-6
    assert not moved[:, :5].any()
    assert moved[:, 5:].all()


def test_anchored_codes_that_sound_alike_start_alike() -> None:
    torch.manual_seed(0)
    lm = DualTrackLM(make_lm().config)
    codes = lm.codes_of("vocal")
    vectors = torch.randn(12, 6) * 5 + 3
    vectors[1] = vectors[0]
    codes.anchor_on(vectors)
    assert codes.vectors.mean(dim=0).abs().max() < 1e-5
    assert codes.vectors.std() == pytest.approx(1.0, abs=1e-5)
    embedded = codes.embed(torch.arange(13))
    torch.testing.assert_close(embedded[0], embedded[1])
    assert (embedded[0] - embedded[2]).abs().max() > 0.1
    assert embedded[12].abs().max() > 0.1  # PAD has an entry of its own
    logits = codes.logits(torch.randn(3, 16))
    torch.testing.assert_close(logits[:, 0], logits[:, 1])
    with pytest.raises(ConfigError, match="build it for this tokenizer"):
        codes.anchor_on(torch.zeros(5, 6))


def test_built_for_a_tokenizer() -> None:
    settings = dict(dim=16, heads=2, feed_forward_dim=16, blocks=1, code_dim=5, head_dim=8)
    tokenizer = DuoTokenizer(DuoTokenizerConfig(vocal_codes=9, accompaniment_codes=17, **settings))
    tokenizer.fingerprint = "abc"
    lm = DualTrackLM.for_tokenizer(tokenizer, make_lm().config)
    assert (lm.config.vocal_codes, lm.config.accompaniment_codes, lm.config.code_dim) == (9, 17, 5)
    assert lm.pads == {"vocal": 9, "accompaniment": 17}
    assert lm.tokenizer_fingerprint == "abc"


def test_saved_and_loaded(tmp_path: Path) -> None:
    lm, codes = make_lm(), make_codes()
    lm.tokenizer_fingerprint = "abc"
    lm.save_pretrained(tmp_path / "lm")
    loaded = DualTrackLM.from_pretrained(tmp_path / "lm")
    assert loaded.config == lm.config
    assert (loaded.fingerprint, loaded.tokenizer_fingerprint) == (lm.fingerprint, "abc")
    layout = lm.lay_out(codes, "unconditional")
    torch.testing.assert_close(loaded(layout)["vocal"], lm(layout)["vocal"], rtol=0, atol=0)
    with pytest.raises(CheckpointError):
        DualTrackLM.from_pretrained(tmp_path / "nothing")


def test_config_errors_name_the_field() -> None:
    for changes in (
        {"heads": 5},
        {"key_value_heads": 3},
        {"vocal_codes": 1},
        {"layers": 0},
        {"attention_dropout": 1.0},
    ):
        with pytest.raises(ConfigError, match=next(iter(changes))):
            make_lm(**changes)


def test_gradient_checkpointing_changes_nothing() -> None:
    codes, gradients = make_codes(), []
    for checkpointing in (False, True):
        lm = make_lm(gradient_checkpointing=checkpointing).train()
        lm(lm.lay_out(codes, "unconditional"))["vocal"].square().mean().backward()
        gradients.append(lm.project.weight.grad)
    torch.testing.assert_close(*gradients)


def test_scores_count_after_the_prefix_only() -> None:
    lm, codes = make_lm(), make_codes(batch=3)
    scores = score_batch(lm, codes["vocal"], codes["accompaniment"], "vocal_to_accompaniment", 2, rows=2)
    losses = scores.loss_nats["accompaniment"]
    assert losses.shape == (3, 7)
    assert set(scores.loss_nats) == {"accompaniment"}
    bits = scores.bits_per_token("accompaniment")
    assert bits == pytest.approx((losses[:, 2:].mean() / torch.tensor(2.0).log()).item(), rel=1e-5)
    first = scores.bits_per_token("accompaniment", first_frames=3)
    assert first == pytest.approx((losses[:, 2:5].mean() / torch.tensor(2.0).log()).item(), rel=1e-5)
    assert scores.accuracy_at("accompaniment", 20) == 1.0
    both = score_batch(lm, codes["vocal"], codes["accompaniment"], "unconditional")
    assert set(both.loss_nats) == {"vocal", "accompaniment"}


def test_damaged_sources() -> None:
    codes = torch.tensor([[1, 2, 3, 4], [5, 6, 7, 8]])
    assert shift_source(codes, 1).tolist() == [[4, 1, 2, 3], [8, 5, 6, 7]]
    generator = torch.Generator().manual_seed(0)
    masked = mask_source(codes.repeat(50, 50), 0.3, 99, generator)
    assert (masked == 99).float().mean().item() == pytest.approx(0.3, abs=0.02)
    lm = make_lm()
    vocal = torch.full((2, 7), lm.pads["vocal"])
    assert score_batch(lm, vocal, make_codes()["accompaniment"], "vocal_to_accompaniment").loss_nats
