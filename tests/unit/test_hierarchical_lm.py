"""AccompGen's stages: what they see, the cache, guidance, windows, the chain behind the contract."""

from dataclasses import replace

import pytest
import torch

from duotok.lm.contract import SamplingConfig
from duotok.lm.hierarchical.drawing import draw_song, draw_window
from duotok.lm.hierarchical.model import STAGES, HierarchicalLM, scale_streams
from duotok.lm.hierarchical.stage import Stage, StageConfig, StreamConfig, lay_out
from duotok.lm.open import open_lm
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError
from duotok.tokenizer.layered import pack_codes, unpack_codes

SMALL = StageConfig(
    hidden_dim=16, layers=2, heads=2, feed_forward_dim=24, position_buckets=16, furthest_steps=64,
    window_seconds=0.4, overlap_seconds=0.08,
)  # fmt: skip
SEMANTIC = StreamConfig(rate_hz=50.0, codebook_size=7)
CODEC = StreamConfig(rate_hz=75.0, levels=3, codebook_size=5)
BOLD = SamplingConfig(guidance=3.0, temperature=1.0, top_k=0, top_p=1.0)


def make_stage(name: str = "coarse", codec: StreamConfig = CODEC, **settings) -> Stage:
    torch.manual_seed(0)
    config = replace(SMALL, **settings)
    stage = Stage(scale_streams(config, name, semantic=SEMANTIC, codec=codec, coarse_levels=2))
    for parameter in stage.blocks.parameters():  # so that attention matters
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.3)
    stage.stage, stage.semantic_fingerprint, stage.codec_fingerprint = name, "s", "c"
    return stage.eval()


def make_lm(codec: StreamConfig = CODEC) -> HierarchicalLM:
    return HierarchicalLM.join([make_stage(name, codec) for name in STAGES])


def codes(stream: StreamConfig, frames: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(stream.codebook_size, (batch, stream.levels, frames), generator=generator)


@pytest.mark.parametrize("codec_hz", [25.0, 50.0, 75.0, 44_100 / 512])
def test_tracks_of_different_rates_stand_at_the_places_of_their_times(codec_hz):
    stage = make_stage(codec=replace(CODEC, rate_hz=codec_hz))
    target = stage.config.target
    places = lay_out(stage.config, 50, 2 * round(codec_hz), torch.device("cpu"))
    seconds = places.place.double() / target.tokens_hz
    assert (seconds[:50] - torch.arange(50) / 50).abs().max() <= 1 / target.tokens_hz
    assert torch.equal(places.place[50:], torch.arange(2 * round(codec_hz)))


def test_a_token_depends_on_the_past_of_its_track_and_on_all_of_the_source():
    stage = make_stage()
    source, target, known = codes(SEMANTIC, 20), codes(stage.config.target, 30), torch.tensor([True])
    logits = stage(source, target, known)
    assert logits.shape == (1, 2, 30, 5)
    later = target.clone()
    later[0, 0, 15] = (later[0, 0, 15] + 1) % 5
    moved = (stage(source, later, known) - logits).abs().amax(dim=-1)[0] > 1e-5
    assert not moved[:, :15].any() and not moved[0, 15] and moved[1, 15]
    assert moved[:, 16:].any()
    heard = source.clone()
    heard[0, 0, -1] = (heard[0, 0, -1] + 1) % 7
    assert ((stage(heard, target, known) - logits).abs() > 1e-6).any(dim=-1).all()
    assert torch.equal(stage(heard, target, ~known), stage(source, target, ~known))


def test_the_bias_is_of_time_and_falls_with_distance():
    stage = make_stage()
    places = lay_out(stage.config, 20, 40, torch.device("cpu"))
    bias = stage.bias(places, places, torch.float32)[-1]  # of the most local head
    row = bias[20 + 30]  # the step at 30 target tokens, 0.2 s, hears source token 10 of 0.2 s best
    assert int(row[:20].argmax()) == 10 and int(row[20:].argmax()) == 30
    assert torch.isinf(row[20 + 31 :]).all() and torch.isfinite(row[: 20 + 31]).all()


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_the_cache_and_guidance_are_those_of_full_passes(guidance):
    """Every code drawn is the one that full passes with and without the source would draw."""
    stage, frames = make_stage(), 12
    stream = stage.config.target
    source, given = codes(SEMANTIC, 8, batch=2), codes(stream, 3, batch=2, seed=1)
    uniform = torch.rand(2, stream.levels, frames, generator=torch.Generator().manual_seed(0))
    sampling = replace(BOLD, guidance=guidance, temperature=0)
    drawn, nats = draw_window(stage, source, given, frames, uniform, sampling)
    assert torch.equal(drawn[:, :, :3], given) and drawn.shape == (2, 2, frames)
    yes, no = torch.ones(2, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    with torch.no_grad():
        told, alone = (stage(source, drawn, known)[:, :, 3:] for known in (yes, no))
    guided = alone + guidance * (told - alone)
    assert torch.equal(guided.argmax(dim=-1), drawn[:, :, 3:])
    for row, logits in zip(nats, (told, alone), strict=False):
        likely = logits.log_softmax(dim=-1).gather(3, drawn[:, :, 3:, None]).sum(dim=(1, 2, 3))
        assert torch.allclose(row, likely, atol=1e-4)
    assert len(nats) == 1 + (guidance != 1.0)


def test_long_songs_go_on_from_the_overlap_of_their_windows():
    stage = make_stage()
    frames, stream = 72, stage.config.target  # 0.96 s in windows of 0.4 s
    source, start = codes(SEMANTIC, 48), codes(stream, 0)
    uniform = torch.rand(1, stream.levels, frames, generator=torch.Generator().manual_seed(0))
    sampling = replace(BOLD, temperature=0)
    song, nats = draw_song(stage, source, start, frames, uniform, sampling)
    assert song.shape == (1, 2, frames) and nats.shape == (2, 1) and bool((nats < 0).all())
    first, _ = draw_window(stage, source[:, :, :20], start, 30, uniform[:, :, :30], sampling)
    assert torch.equal(song[:, :, :30], first)
    # The second window begins 0.08 s before the first one's end: at frame 24, semantic frame 16.
    given, draws = song[:, :, 24:30], uniform[:, :, 24:54]
    second, _ = draw_window(stage, source[:, :, 16:36], given, 30, draws, sampling)
    assert torch.equal(song[:, :, 24:54], second)


@pytest.mark.parametrize("codec_hz", [25.0, 50.0, 75.0, 44_100 / 512, 12.5])
def test_packed_codes_keep_all_semantic_codes(codec_hz):
    semantic, acoustic = torch.arange(200), torch.arange(2 * round(4 * codec_hz)).view(2, -1)
    rates = {"semantic_hz": 50.0, "codec_hz": codec_hz}
    own, codec = unpack_codes(pack_codes(semantic, acoustic, **rates), **rates)
    assert torch.equal(codec, acoustic)
    assert torch.equal(own, semantic[: len(own)]) and len(own) >= 198


@pytest.mark.parametrize("codec_hz", [25.0, 75.0])
def test_the_chain_composes_as_long_as_the_vocal_and_keeps_a_prefix(codec_hz):
    lm = make_lm(replace(CODEC, rate_hz=codec_hz))
    vocal, told = codes(SEMANTIC, 33)[0, 0], []
    found = lm.compose(vocal, seeds=[3, 4], sampling=BOLD, progress=told.append)
    rows = 2 if codec_hz == 25 else 1
    assert found.codes.shape == (2, rows + 3, -(-33 * round(codec_hz) // 50))
    assert told == sorted(told) and told[-1] == 33
    assert found.likelihood_nats is not None and found.information_nats is not None
    assert found.information_nats.shape == (2,)
    alone = lm.compose(vocal, seeds=[4], sampling=BOLD)
    assert torch.equal(alone.codes[0], found.codes[1])
    assert not torch.equal(found.codes[0], found.codes[1])
    prefix = found.codes[0, :, :12]  # whole semantic frames
    again = lm.compose(vocal, seeds=[9], sampling=BOLD, prefix=prefix)
    assert torch.equal(again.codes[0, :, :12], prefix) and again.codes.shape[1:] == found.codes.shape[1:]
    assert lm.compose(vocal, seeds=[1]).likelihood_alone_nats is not None
    ended = lm.compose(vocal, seeds=[9], sampling=BOLD, prefix=prefix, stop=15).codes
    assert torch.equal(ended[0, :, :12], prefix) and ended.shape[2] == 15
    short = lm.compose(vocal[:18], seeds=[3, 4], sampling=replace(BOLD, guidance=1.0))  # one window
    assert short.likelihood_nats is not None
    assert torch.allclose(lm.judge(vocal[:18], short.codes, first=0), short.likelihood_nats, atol=1e-3)
    plain = lm.compose(vocal, seeds=[1], sampling=replace(BOLD, guidance=1.0))
    assert plain.likelihood_alone_nats is None


def test_it_is_opened_by_its_kind_with_the_same_weights(tmp_path):
    lm = make_lm()
    lm.save_pretrained(tmp_path / "lm")
    opened = open_lm(tmp_path / "lm")
    assert isinstance(opened, HierarchicalLM)
    assert (opened.tokenizer_fingerprint, opened.codec_fingerprint) == ("s", "c")
    vocal = codes(SEMANTIC, 20)[0, 0]
    assert torch.equal(
        opened.compose(vocal, seeds=[0], sampling=BOLD).codes,
        lm.compose(vocal, seeds=[0], sampling=BOLD).codes,
    )
    assert opened.band is None and opened.read_sheet(vocal[None]) is None
    assert opened.hear_sheet(vocal[None]) is None


def test_three_base_stages_have_the_papers_size():
    codec = StreamConfig(rate_hz=75.0, levels=8, codebook_size=1024)
    with torch.device("meta"):
        stages = [
            Stage(scale_streams(StageConfig(), name, semantic=StreamConfig(), codec=codec, coarse_levels=4))
            for name in STAGES
        ]
    assert sum(p.numel() for stage in stages for p in stage.parameters()) == pytest.approx(250e6, rel=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source": torch.full((9,), 7)}, "vocal codes must be in 0..6, got 7..7"),
        ({"source": torch.zeros(2, 9).long()}, "semantic codes"),
        ({"seeds": []}, "at least one seed"),
        ({"prefix": torch.zeros(5, 3).long()}, r"this model's are \[4, frames\]"),
        ({"prefix": torch.full((4, 3), 9)}, "given codes must be in"),
        ({"sheet": torch.zeros(9, 10).long()}, "no lead sheet"),
    ],
)
def test_what_is_not_this_models_is_one_line(change, message):
    asked = {"source": torch.zeros(9).long(), "seeds": [0], **change}
    with pytest.raises((DataError, ConfigError), match=message) as caught:
        make_lm().compose(asked.pop("source"), **asked)
    assert "\n" not in str(caught.value)


def test_stages_that_do_not_belong_together_are_refused():
    stages = [make_stage(name) for name in STAGES]
    with pytest.raises(CheckpointError, match="one stage each"):
        HierarchicalLM.join([stages[0], stages[0], stages[2]])
    stages[2].codec_fingerprint = "other"
    with pytest.raises(CheckpointError, match="other tokens"):
        HierarchicalLM.join(stages)
    with pytest.raises(ConfigError, match="coarse_levels must be in 1..1"):
        make_stage("fine", replace(CODEC, levels=2))
    with pytest.raises(ConfigError, match="must be one of semantic, coarse, fine"):
        make_stage("medium")
