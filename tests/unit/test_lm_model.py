"""The language model: the layout of windows, the model that reads them, its kernels, and sampling from it."""

import importlib.util
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from duotok.lm.contract import SamplingConfig
from duotok.lm.dual_track import backbone
from duotok.lm.dual_track.backbone import choose_attention
from duotok.lm.dual_track.decoding import CachedDecoder
from duotok.lm.dual_track.layout import lay_out, mode_into
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.lm.dual_track.sampling import draw_uniform, pick_codes
from duotok.lm.dual_track.scoring import mask_source, score_batch, shift_source
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.model import DuoTokenizer, DuoTokenizerConfig

CUDA, HALF = torch.device("cuda", 0), torch.bfloat16
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


@pytest.fixture
def flash_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on an Ampere card with flash-attn installed; neither is here."""
    monkeypatch.setattr(backbone, "find_spec", lambda name: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))


def test_without_the_package_it_is_sdpa():
    if importlib.util.find_spec("flash_attn") is not None:
        pytest.skip("flash-attn is installed")
    assert choose_attention(torch.device("cpu"), HALF, 64).name == "sdpa"
    choice = choose_attention(CUDA, HALF, 64)
    assert choice.name == "sdpa" and "not installed" in choice.reason


def test_flash_attention_where_everything_fits(flash_installed):
    for dtype in (torch.float16, torch.bfloat16):
        assert choose_attention(CUDA, dtype, 128).name == "flash_attention_2"


def test_each_thing_missing_is_the_reason(flash_installed, monkeypatch):
    assert "needs CUDA" in choose_attention(torch.device("mps"), HALF, 64).reason
    assert "half precision, this is float32" in choose_attention(CUDA, torch.float32, 64).reason
    assert "256" in choose_attention(CUDA, HALF, 512).reason
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    choice = choose_attention(CUDA, HALF, 64)
    assert choice.name == "sdpa" and "Tesla T4" in choice.reason


def test_the_choice_is_logged_once(caplog):
    lm = make_lm()
    layout = lm.lay_out(make_codes(), "unconditional")
    with caplog.at_level(logging.INFO, logger="duotok.lm.dual_track.model"), torch.no_grad():
        for _ in range(3):
            lm(layout)
    told = [record.getMessage() for record in caplog.records if "attention" in record.getMessage()]
    assert told == ["attention: sdpa (flash-attention 2 needs CUDA, this is cpu)"]


def generate_track(
    lm: DualTrackLM,
    codes: Tensor,
    *,
    seed: int,
    prefix: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
    track: str = "accompaniment",
    **settings: Any,
) -> Tensor:
    """Codes [frames] of one candidate."""
    config = SamplingConfig(**settings)
    found = lm.compose(codes, seeds=[seed], sampling=config, prefix=prefix, progress=progress, track=track)
    return found.codes[0]


def make_vocal(frames: int) -> Tensor:
    return torch.randint(0, 12, (frames,), generator=torch.Generator().manual_seed(frames))


def make_decoder(lm: DualTrackLM, **sizes: int) -> CachedDecoder:
    return CachedDecoder(lm.backbone, shared_positions=lm.config.shared_positions, **sizes)


def full_logits(lm: DualTrackLM, vocal: Tensor, accompaniment: Tensor, guidance: float) -> Tensor:
    """Guided logits [frames, codes] by two passes of the whole model, without any cache."""
    codes = {"vocal": vocal[None], "accompaniment": accompaniment[None]}
    rows = []
    for drop in (False, True):
        layout = lm.lay_out(codes, "vocal_to_accompaniment", drop_source=torch.tensor([drop]))
        with torch.no_grad():
            rows.append(lm(layout)["accompaniment"][0])
    given, absent = rows
    return absent + guidance * (given - absent)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_the_cache_gives_the_states_of_one_pass(key_value_heads: int) -> None:
    lm = make_lm(key_value_heads=key_value_heads)
    codes = {"vocal": make_vocal(9)[None], "accompaniment": torch.arange(9)[None]}
    layout = lm.lay_out(codes, "vocal_to_accompaniment")
    with torch.no_grad():
        expected = lm.hidden_states(layout)
        inputs = lm.embed(layout.vocal, layout.accompaniment, layout.segment)
    decoder = make_decoder(lm, branches=1, candidates=1, prompt_steps=9, target_steps=9)
    for _ in range(2):  # a second song in the same buffers
        parts = [decoder.hear(inputs[:, :9]), decoder.advance(inputs[:, 9:12])]
        parts += [decoder.advance(inputs[:, 9 + i : 10 + i]) for i in range(3, 9)]
        torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("key_value_heads", [1, 2, 4])
def test_rows_that_share_a_prompt_stay_apart(key_value_heads: int) -> None:
    lm = make_lm(key_value_heads=key_value_heads)
    prompts, targets = torch.randn(2, 7, 16), torch.randn(2, 3, 5, 16)  # 2 branches of 3 candidates
    together = make_decoder(lm, branches=2, candidates=3, prompt_steps=7, target_steps=5)
    alone = make_decoder(lm, branches=1, candidates=1, prompt_steps=7, target_steps=5)
    together.hear(prompts)
    rows = targets.flatten(0, 1)
    found = [together.advance(rows[:, :2]), *(together.advance(rows[:, i : i + 1]) for i in range(2, 5))]
    together.hear(prompts[:1])  # the second branch keeps its prompt
    again = [together.advance(rows[:, :2]), *(together.advance(rows[:, i : i + 1]) for i in range(2, 5))]
    for row in range(6):
        alone.hear(prompts[row // 3][None])
        expected = torch.cat([alone.advance(rows[row, i][None, None]) for i in range(5)], dim=1)[0]
        for states in (found, again):
            torch.testing.assert_close(torch.cat(states, dim=1)[row], expected, atol=2e-6, rtol=1e-4)


def test_a_step_of_fixed_work_gives_the_same_states() -> None:
    # What a CUDA graph repeats: nothing depends on how far the song is, the future is masked.
    lm = make_lm()
    decoders = [make_decoder(lm, branches=2, candidates=2, prompt_steps=4, target_steps=6) for _ in range(2)]
    prompts = torch.randn(2, 4, 16)
    for decoder in decoders:
        decoder.hear(prompts)
    for place in range(6):
        hidden = torch.randn(4, 1, 16)
        expected = decoders[0].advance(hidden)
        found = decoders[1].step(hidden, torch.tensor([place]))
        torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-4)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.7])
@pytest.mark.parametrize(("shared", "aligned"), [(True, True), (True, False), (False, False)])
def test_greedy_sampling_follows_the_full_model(guidance: float, shared: bool, aligned: bool) -> None:
    lm, vocal = make_lm(shared_positions=shared, aligned_source=aligned), make_vocal(12)
    codes = generate_track(lm, vocal, seed=0, temperature=0, guidance=guidance)
    # Each code is the likeliest one given the codes before it.
    assert torch.equal(full_logits(lm, vocal, codes, guidance).argmax(dim=-1), codes)


@pytest.mark.parametrize("shared", [True, False])
def test_greedy_windows_follow_the_full_model(shared: bool) -> None:
    lm, vocal = make_lm(shared_positions=shared), make_vocal(27)
    codes = generate_track(lm, vocal, seed=0, temperature=0, guidance=1.5, window_frames=10, overlap_frames=4)
    # Windows begin at 0, 6, 12 and, moved back to be whole, 17; what is new begins after the overlap.
    for start, new in ((0, 0), (6, 10), (12, 16), (17, 22)):
        window = slice(start, start + 10)
        likeliest = full_logits(lm, vocal[window], codes[window], 1.5).argmax(dim=-1)
        assert torch.equal(likeliest[new - start :], codes[new : start + 10])


def test_the_vocal_matters_and_guidance_raises_it() -> None:
    lm = make_lm()
    one, other = make_vocal(10), make_vocal(11)[:10]
    heard = [generate_track(lm, vocal, seed=3, temperature=0) for vocal in (one, other)]
    assert not torch.equal(*heard)
    unheard = [generate_track(lm, vocal, seed=3, guidance=0.0) for vocal in (one, other)]
    assert torch.equal(*unheard)


def test_one_thread_decodes_and_the_others_come_back() -> None:
    before, seen = torch.get_num_threads(), set()
    torch.set_num_threads(2)
    try:
        generate_track(make_lm(), make_vocal(6), seed=0, progress=lambda _: seen.add(torch.get_num_threads()))
        assert seen == {1} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_seeds() -> None:
    lm, vocal = make_lm(), make_vocal(40)
    first = generate_track(lm, vocal, seed=1, temperature=1.0)
    assert torch.equal(first, generate_track(lm, vocal, seed=1, temperature=1.0))
    assert not torch.equal(first, generate_track(lm, vocal, seed=2, temperature=1.0))
    config = SamplingConfig(temperature=1.0)
    both = lm.compose(vocal, seeds=[1, 2], sampling=config).codes
    assert both.shape == (2, 40)
    assert torch.equal(both[0], first)


def test_a_candidate_is_the_same_in_any_company() -> None:
    lm, vocal = make_lm(), make_vocal(50)
    config = SamplingConfig(temperature=1.0, guidance=2.0, window_frames=20, overlap_frames=6)
    many = lm.compose(vocal, seeds=[4, 5, 6, 7, 8], sampling=config)
    few = lm.compose(vocal, seeds=[7, 4], sampling=config)
    assert torch.equal(few.codes, many.codes[[3, 0]])
    for name in ("likelihood_nats", "likelihood_alone_nats", "information_nats"):
        torch.testing.assert_close(getattr(few, name), getattr(many, name)[[3, 0]], atol=1e-4, rtol=1e-4)


def test_likelihoods_are_those_of_the_full_model() -> None:
    lm, vocal, prefix = make_lm(), make_vocal(14), torch.arange(3)
    found = lm.compose(
        vocal, seeds=[0, 1], sampling=SamplingConfig(guidance=1.7, temperature=0.8), prefix=prefix
    )
    for guidance, means in ((1.0, found.likelihood_nats), (0.0, found.likelihood_alone_nats)):
        assert means is not None
        for codes, mean in zip(found.codes, means, strict=True):
            logits = full_logits(lm, vocal, codes, guidance)
            expected = logits.log_softmax(dim=-1).gather(1, codes[:, None])[3:].mean()
            torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)
    plain = lm.compose(vocal, seeds=[0], sampling=SamplingConfig(guidance=1.0))
    assert plain.likelihood_nats is not None
    assert plain.likelihood_alone_nats is None and plain.information_nats is None
    given = lm.compose(vocal[:2], seeds=[0], prefix=prefix)
    assert given.likelihood_nats is None  # nothing was sampled


def test_a_given_prefix_is_kept_and_continued() -> None:
    lm, vocal, prefix = make_lm(), make_vocal(30), torch.arange(13)
    codes = generate_track(lm, vocal, prefix=prefix, seed=0, temperature=0, guidance=1.5)
    assert torch.equal(codes[:13], prefix)
    assert torch.equal(full_logits(lm, vocal, codes, 1.5).argmax(dim=-1)[13:], codes[13:])
    assert torch.equal(generate_track(lm, vocal[:5], prefix=prefix, seed=0), prefix[:5])


def test_a_stretch_ends_where_it_is_told_and_hears_the_singer_further() -> None:
    lm, vocal, prefix = make_lm(), make_vocal(20), torch.arange(3)
    whole = lm.compose(vocal, seeds=[0, 1], prefix=prefix)
    stretch = lm.compose(vocal, seeds=[0, 1], prefix=prefix, stop=12)
    assert torch.equal(stretch.codes, whole.codes[:, :12])
    assert not torch.equal(lm.compose(vocal[:12], seeds=[0, 1], prefix=prefix).codes, stretch.codes)
    windows = SamplingConfig(window_frames=8, overlap_frames=2)
    assert lm.compose(vocal, seeds=[0], prefix=prefix, stop=17, sampling=windows).codes.shape == (1, 17)


def test_what_follows_is_judged_as_it_was_drawn() -> None:
    lm, vocal, prefix = make_lm(), make_vocal(16), torch.arange(5)
    drawn = lm.compose(vocal, seeds=[0, 1, 2], prefix=prefix, sampling=SamplingConfig(guidance=1.0))
    judged = lm.judge(vocal, drawn.codes, first=5)
    assert drawn.likelihood_nats is not None
    assert torch.allclose(judged, drawn.likelihood_nats, atol=1e-4) and len(set(judged.tolist())) == 3
    # After the codes that they were drawn from, ends are likelier than after others.
    with torch.no_grad():
        lm.codes_of("accompaniment").residual_out.weight.mul_(4)
    as_it_is = SamplingConfig(guidance=1.0, temperature=1.0, top_k=0, top_p=1.0)
    own = lm.compose(vocal, seeds=range(40), sampling=as_it_is).codes
    other = torch.cat([own[:, :10].roll(1, dims=0), own[:, 10:]], dim=1)
    right, wrong = (lm.judge(vocal, codes, first=10) for codes in (own, other))
    assert right.mean() > wrong.mean() + 0.02
    for codes, first in ((own[0], 0), (own, 16), (own[:, :9], 2)):
        with pytest.raises(DataError, match="do not fit 16 frames"):
            lm.judge(vocal, codes, first=first)


def test_the_mirror_direction() -> None:
    lm = make_lm()
    vocal = generate_track(lm, torch.arange(20), seed=0, track="vocal")
    assert vocal.shape == (20,)
    assert int(vocal.max()) < 12


def test_progress_counts_finished_frames() -> None:
    seen: list[int] = []
    windows = dict(window_frames=10, overlap_frames=3)
    generate_track(make_lm(), make_vocal(25), seed=0, **windows, progress=seen.append)
    assert seen == list(range(1, 26))


def test_codes_are_drawn_by_their_probability() -> None:
    logits = torch.log(torch.tensor([0.1, 0.4, 0.3, 0.2])).expand(1000, 4)
    evenly = (torch.arange(1000) + 0.5) / 1000

    def count(**settings: float) -> list[int]:
        config = SamplingConfig(**{"temperature": 1.0, "top_k": 0, "top_p": 1.0, **settings})
        return torch.bincount(pick_codes(logits, evenly, config), minlength=4).tolist()

    assert count() == pytest.approx([100, 400, 300, 200], abs=1)
    assert count(top_k=2) == pytest.approx([0, 571, 429, 0], abs=1)
    assert count(top_p=0.5) == pytest.approx([0, 571, 429, 0], abs=1)  # 0.4 alone does not reach one half
    assert count(top_p=0.3) == count(temperature=0) == count(temperature=0.01) == [0, 1000, 0, 0]
    assert count(top_p=0.8) == pytest.approx([0, 444, 333, 222], abs=1)
    assert count(temperature=0.5) == pytest.approx([33, 533, 300, 133], abs=1)
    # The largest number below 1 picks the least likely code that is left, never one that is cut off.
    last = torch.full((1000,), 1 - 2**-24)
    assert set(pick_codes(logits, last, SamplingConfig(top_p=0.5)).tolist()) == {2}
    first = torch.zeros(1000)
    assert set(pick_codes(logits, first, SamplingConfig()).tolist()) == {1}


def test_likely_codes_are_found_without_the_order_of_the_others() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = 2 * torch.randn(400, 1_000, generator=generator)
    uniform = torch.rand(400, generator=generator)
    likely, codes = logits.double().softmax(dim=-1).sort(dim=-1, descending=True)
    expected = codes.gather(1, (likely.cumsum(dim=-1) <= uniform[:, None]).sum(dim=-1, keepdim=True))[:, 0]
    config = SamplingConfig(temperature=1.0, top_k=0, top_p=1.0)
    places = torch.arange(400).split(1)  # one by one, as one row in which it is not so decides for all
    found = torch.cat([pick_codes(logits[place], uniform[place], config) for place in places])
    assert torch.equal(found, expected) and torch.equal(pick_codes(logits, uniform, config), expected)


def test_who_follows_hears_the_codes_as_they_grow() -> None:
    lm, vocal, config = make_lm(), make_vocal(130), SamplingConfig(window_frames=60, overlap_frames=6)
    seen: list[Tensor] = []
    found = lm.compose(vocal, seeds=[3, 4], sampling=config, follow=seen.append).codes
    lengths = [codes.shape[1] for codes in seen]
    assert lengths == sorted(lengths) and lengths[-1] == 130 and len(lengths) >= 4
    assert all(torch.equal(codes, found[:, :length]) for codes, length in zip(seen, lengths, strict=True))
    assert not seen[0].is_inference()


def test_numbers_of_a_longer_song_begin_alike() -> None:
    assert torch.equal(draw_uniform(7, 1000)[:100], draw_uniform(7, 100))


def test_errors_of_sampling_say_what_is_wrong() -> None:
    lm = make_lm()
    with pytest.raises(DataError, match="0..11"):
        generate_track(lm, torch.tensor([12]), seed=0)
    with pytest.raises(DataError, match=r"\[frames\]"):
        generate_track(lm, torch.zeros(1, 4).long(), seed=0)
    with pytest.raises(DataError, match="one frame"):
        generate_track(lm, torch.zeros(0).long(), seed=0)
    with pytest.raises(DataError, match="0..19"):
        generate_track(lm, make_vocal(5), prefix=torch.tensor([20]), seed=0)
    for settings in ({"temperature": -1.0}, {"top_p": 0.0}, {"guidance": -1.0}, {"overlap_frames": 750}):
        with pytest.raises(ConfigError, match=next(iter(settings))):
            generate_track(lm, make_vocal(5), seed=0, **settings)
