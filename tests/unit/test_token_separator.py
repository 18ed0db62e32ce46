"""The token separator: what its steps see, the cache, windows of a song, codec and semantic codes, losses."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from duotok.lm.hierarchical.stage import StreamConfig
from duotok.lm.separator.conformer import ConformerConfig
from duotok.lm.separator.model import TokenSeparator, TokenSeparatorConfig, TokenSeparatorObjective
from duotok.lm.separator.writing import plan_windows, write_song, write_windows
from duotok.recipes.lm.separator.train_token_separator import (
    EQUALIZER_HZ,
    AugmentationConfig,
    augment,
    equalize,
)
from duotok.renderer.latent_codec import open_codec
from duotok.tokenizer.common.errors import AudioError, CheckpointError, ConfigError
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.semantic import SemanticTokenizer

SMALL = TokenSeparatorConfig(
    tracks=("vocal", "accompaniment"),
    codec=StreamConfig(rate_hz=50.0, levels=3, codebook_size=8),
    codes_per_step=2,
    conformer=ConformerConfig(mel_bands=8, dim=8, layers=1, heads=2, feed_forward_dim=8, kernel_frames=3),
    hidden_dim=16, layers=2, heads=2, feed_forward_dim=24, window_seconds=0.2, overlap_seconds=0.08,
)  # fmt: skip
SEMANTIC = StreamConfig(rate_hz=50.0, levels=1, codebook_size=5)
VARIANTS = {
    "paper": {},
    "flattened, semantic codes": {"codes_per_step": 1, "semantic": SEMANTIC},
    "in time": {"positions": "time", "mixture_at_steps": True},
    "parallel": {"is_parallel": True, "positions": "time", "semantic": SEMANTIC},
    "from the mixture alone": {"sees_past": False, "positions": "time", "mixture_at_steps": True},
    "another rate": {"codec": StreamConfig(rate_hz=75.0, levels=2, codebook_size=8), "positions": "time"},
}


def make(**settings) -> TokenSeparator:
    torch.manual_seed(0)
    model = TokenSeparator(replace(SMALL, **settings))
    for name, parameter in model.named_parameters():  # so that all of it matters
        if parameter.ndim >= 2 and "norm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def make_waves(windows: int, model: TokenSeparator) -> torch.Tensor:
    return 0.1 * torch.randn(windows, model.config.samples, generator=torch.Generator().manual_seed(1))


def make_codes(model: TokenSeparator, windows: int = 2) -> torch.Tensor:
    config = model.config
    rows = [torch.randint(size, (windows, len(config.tracks), config.frames)) for size in config.row_sizes]
    return torch.stack(rows, dim=2)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_written_with_a_cache_is_what_full_passes_find_most_likely(name):
    model = make(**VARIANTS[name])
    waves = make_waves(2, model)
    codes = write_windows(model, waves)
    assert len(codes.unique()) > 3
    for group, logits in zip(model.config.groups, model(waves, codes), strict=True):
        size = model.config.row_sizes[group.start]
        found = logits[..., : model.config.frames, :size].argmax(dim=-1)
        assert torch.equal(found, codes[:, :, group.start : group.stop])


@pytest.mark.parametrize("name", ["paper", "in time", "parallel"])
def test_a_step_sees_the_mixture_the_tracks_before_and_its_own_past(name):
    model = make(**VARIANTS[name])
    waves, codes = make_waves(1, model), make_codes(model, 1)
    before = model(waves, codes)
    changed = codes.clone()
    changed[0, 0, :, 5] = (changed[0, 0, :, 5] + 1) % 5
    moved = [
        (new - old).abs().amax(dim=(2, 4))[0] > 1e-6
        for new, old in zip(model(waves, changed), before, strict=True)
    ]
    first = moved[0]  # [tracks, frames]
    assert not first[0, :6].any() and first[0, 6]
    assert first[1, :6].any() != model.config.is_parallel and first[1, 6]
    other = model(waves.flip(-1), codes)
    assert all(
        ((new - old).abs().amax(dim=(2, 4)) > 1e-6).all() for new, old in zip(other, before, strict=True)
    )


def test_without_its_past_a_step_sees_the_mixture_only():
    model = make(**VARIANTS["from the mixture alone"])
    waves, codes = make_waves(1, model), make_codes(model, 1)
    for heard, alike in ((waves, True), (waves.flip(-1), False)):
        pairs = zip(model(waves, codes), model(heard, codes.roll(1, -1)), strict=True)
        assert all(torch.equal(one, two) == alike for one, two in pairs)
    sum(logits.sum() for logits in model(waves, codes)).backward()
    assert [name for name, each in model.named_parameters() if each.requires_grad and each.grad is None] == []


def test_places_in_time_are_the_same_for_what_sounds_together():
    model = make(positions="time", codes_per_step=2)  # two steps a frame
    features = torch.zeros(1, 10, 16)
    assert model.begin(features).positions.tolist() == [0, *range(0, 20, 2)]
    for sequence in range(2):
        assert model.enter(torch.zeros(1, 4, 16), features, sequence, 3).positions.tolist() == [3, 4, 5, 6]
    plain = make()
    assert plain.begin(features).positions.tolist() == list(range(11))
    assert plain.enter(torch.zeros(1, 2, 16), features, 1, 0).positions.tolist() == [32, 33]


@pytest.mark.parametrize("frames", [10, 13, 16, 23, 60])
def test_windows_cover_a_song_and_are_whole(frames):
    plan = plan_windows(SMALL, frames)
    starts = [window.start for window in plan]
    assert starts[0] == plan[0].given == 0 and starts[-1] + 10 == frames
    assert all(0 < after - before <= 6 for before, after in pairwise(starts))
    for before, (start, given) in zip(starts, plan[1:], strict=False):
        assert (
            abs((given - start) - (before + 10 - given)) <= 1
        )  # as far from one's start as from the other's end


def test_a_song_is_written_by_windows_that_change_in_the_middle_of_their_overlap():
    model = make(positions="time", mixture_at_steps=True)
    wave = make_waves(3, model).flatten()[: round(2.37 * model.config.samples)]
    told: list[float] = []
    codes = write_song(model, wave, rows=2, progress=told.append)
    frames = -(-len(wave) // 960)
    assert codes.shape == (2, 3, frames) and told[-1] == pytest.approx(1.0) and told == sorted(told)
    padded = torch.nn.functional.pad(wave, (0, frames * 960 - len(wave)))
    plan = plan_windows(model.config, frames)
    windows = write_windows(model, torch.stack([padded[960 * k : 960 * k + 9600] for k, _ in plan]))
    stops = [*(given for _, given in plan[1:]), frames]
    for (start, given), stop, found in zip(plan, stops, windows, strict=True):
        assert torch.equal(codes[..., given:stop], found[..., given - start : stop - start])
    with pytest.raises(AudioError, match=r"lasts 0.10 s, this separator hears 0.2 s at once"):
        write_song(model, wave[:4800])


@pytest.fixture
def codec(tiny_codec):
    return open_codec(tiny_codec)


def test_the_codes_are_those_of_codec_and_semantic_tokenizer(codec, tiny_components):
    torch.manual_seed(0)
    tokenizer = DuoTokenizer.from_pretrained(tiny_components["tokenizer"])
    semantic = SemanticTokenizer.on_tokenizer(tokenizer, clusters=5)
    model = make(semantic=SEMANTIC)
    objective = TokenSeparatorObjective(model, codec, semantic).eval()
    tracks = 0.1 * torch.randn(2, 2, model.config.samples)
    codes = objective.encode(tracks)
    assert codes.shape == (2, 2, 4, 10)
    assert torch.equal(codes[1, 0, :3], codec.encode(tracks[1, :1][None])[0, :3])
    assert torch.equal(codes[1, 0, 3], semantic.encode(tracks[1, :1][None])[0])


def test_losses_are_weighted_by_level_and_the_frozen_parts_stay(codec):
    model = make()
    tracks = 0.1 * torch.randn(2, 2, model.config.samples)
    plain = TokenSeparatorObjective(model, codec, level_weights=(1.0,), label_smoothing=0.0).eval()
    steep = TokenSeparatorObjective(model, codec, level_weights=(8.0, 4.0, 3.0), label_smoothing=0.0).eval()
    codes = plain.encode(tracks)
    nats, end = plain.nats(tracks.sum(dim=1), codes, 0.0)
    likely = model(tracks.sum(dim=1), codes)[1].log_softmax(dim=-1)  # of the third level
    picked = likely.gather(-1, codes[:, :, 2:, :, None])[..., 0]
    torch.testing.assert_close(nats[:, 2], -picked.mean(dim=(0, 2, 3)))
    for objective, weights in ((plain, [1, 1, 1]), (steep, [8, 4, 3])):
        wanted = (nats.mean(dim=0) * torch.tensor(weights)).sum() / sum(weights)
        found = objective(tracks)
        torch.testing.assert_close(found["total"], (10 * wanted + end) / 11)
        assert found.keys() == {"total", "end", "vocal", "accompaniment", "level0", "level1", "level2"}
    plain.train()(tracks)["total"].backward()
    assert not codec.training and all(parameter.grad is None for parameter in codec.parameters())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_frozen_features_take_the_place_of_the_conformer(tiny_components, tmp_path):
    tokenizer = DuoTokenizer.from_pretrained(tiny_components["tokenizer"])
    heard = SemanticTokenizer.on_tokenizer(tokenizer, clusters=2)
    model = make(features=heard.config)
    model.encoder.load_state_dict(heard.state_dict())
    model.train()
    assert not model.encoder.training
    model(make_waves(1, model), make_codes(model, 1))[0].sum().backward()
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    model.save_pretrained(tmp_path / "model")
    again = TokenSeparator.from_pretrained(tmp_path / "model")
    wave = make_waves(1, model)
    assert torch.equal(write_windows(again, wave), write_windows(model.eval(), wave))


def test_the_codec_must_be_the_one_whose_codes_it_writes(codec):
    model = make()
    model.require_codec(codec)
    model.codec_fingerprint = "another"
    with pytest.raises(CheckpointError, match=r"codec another \(3 codebooks of 8 at 50 Hz\)"):
        model.require_codec(codec)
    for stream in (replace(SMALL.codec, levels=5), replace(SMALL.codec, codebook_size=9)):
        with pytest.raises(CheckpointError, match="give that one"):
            make(codec=stream).require_codec(codec)


def test_the_equalizer_has_seven_bands_and_no_delay():
    tones = torch.stack([(2 * torch.pi * hz * torch.arange(48_000) / 48_000).sin() for hz in EQUALIZER_HZ])
    bands_db = torch.tensor([-6.0, 6.0, 0.0, 3.0, -3.0, 1.0, -1.0])
    found = equalize(tones, bands_db.expand(7, 7))
    wanted = tones * 10 ** (bands_db[:, None] / 20)
    assert (found - wanted).abs().max() < 0.01
    between = torch.tensor([60.0 * 150.0]).sqrt()  # half an octave's way from the first to the second
    tone = (2 * torch.pi * between.round() * torch.arange(48_000) / 48_000).sin()
    assert (equalize(tone, bands_db) - tone).abs().max() < 0.02


def test_each_track_has_a_gain_a_polarity_and_an_equalizer_of_its_own():
    tracks = torch.ones(200, 2, 8)
    flat = augment(tracks, AugmentationConfig(equalizer_db=0.0), np.random.default_rng(0))
    gains = flat[..., 0]
    torch.testing.assert_close(flat, gains[..., None].expand_as(flat))
    assert 0.5 <= gains.abs().min() < 0.55 and 1.45 < gains.abs().max() <= 1.5
    assert 0.05 < (gains < 0).float().mean() < 0.15 and (gains[:, 0] != gains[:, 1]).all()
    coloured = augment(tracks, AugmentationConfig(), np.random.default_rng(0))
    ratio_db = 20 * (coloured.mean(dim=-1) / gains).log10()  # of the lowest band
    assert ratio_db.abs().max() <= 4.0 and ratio_db.std() > 1.5


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ({"tracks": ("vocal", "drums")}, "tracks must share out"),
        ({"tracks": ("vocal", "piano")}, "unknown track 'piano'"),
        ({"semantic": replace(SEMANTIC, rate_hz=25.0)}, "at 50 Hz, got 25 Hz"),
        ({"positions": "anywhere"}, "positions must be one of"),
        ({"overlap_seconds": 0.15}, "overlap_seconds must be"),
        ({"heads": 3}, "does not divide"),
        ({"window_seconds": 0.01, "overlap_seconds": 0.0}, "must hold a frame"),
    ],
)
def test_settings_that_cannot_be_are_told(setting, told):
    with pytest.raises(ConfigError, match=told):
        replace(SMALL, **setting)
