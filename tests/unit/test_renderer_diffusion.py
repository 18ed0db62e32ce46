"""The diffusion decoder: sampling, in-painting, guidance, storing, local attention."""

import pytest
import torch

from duotok.renderer.diffusion import (
    DiffusionDecoder,
    DiffusionDecoderConfig,
    Known,
    LocalAttention,
    ModulatedTransformer,
)
from duotok.renderer.diffusion_path import DiffusionPath
from duotok.tokenizer.common.errors import CheckpointError, ConfigError


def make_decoder(**settings):
    torch.manual_seed(0)
    values = dict(
        feature_dim=12, latent_dim=6, dim=16, heads=2, feed_forward_dim=24, blocks=1, condition_blocks=1,
        patch_frames=2, window_seconds=0.5,
    )  # fmt: skip
    decoder = DiffusionDecoder(DiffusionDecoderConfig(**{**values, **settings})).eval()
    # Layers that start at zero would hide a mistake behind them.
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    decoder.latent_mean.fill_(0.7)
    decoder.latent_deviation.fill_(1.3)
    return decoder


def draw(decoder, features, seed=0, **settings):
    generator = torch.Generator().manual_seed(seed)
    return decoder.sample(features, **{"steps": 3, "guidance": 2.0, **settings}, generator=generator)


@pytest.mark.parametrize("objective", ["flow", "v"])
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_sampling_follows_the_seed_only(objective, patch_frames):
    decoder = make_decoder(objective=objective, patch_frames=patch_frames)
    features = torch.randn(2, 9, 12)
    first = draw(decoder, features)
    torch.manual_seed(99)
    assert first.shape == (2, 6, 18) and first.isfinite().all()
    assert torch.equal(first, draw(decoder, features))
    assert not torch.allclose(first, draw(decoder, features, seed=1))


@pytest.mark.parametrize("objective", ["flow", "v"])
@pytest.mark.parametrize("count", [0, 1, 7, 18])
def test_known_frames_come_back_exactly_and_the_rest_listens_to_them(objective, count):
    decoder = make_decoder(objective=objective)
    features = torch.randn(2, 9, 12)
    known = torch.randn(2, 6, count)
    latents = draw(decoder, features, known_latents=known)
    assert torch.equal(latents[:, :, :count], known)
    if 0 < count < 18:
        other = draw(decoder, features, known_latents=known + 1)
        assert not torch.allclose(latents[:, :, count:], other[:, :, count:])


def test_guidance_one_is_the_plain_conditional_model():
    decoder = make_decoder()
    features = torch.randn(1, 6, 12)
    plain = draw(decoder, features, guidance=1)
    assert torch.allclose(plain, draw(decoder, features, guidance=1 + 1e-6), atol=1e-3)
    assert not torch.allclose(plain, draw(decoder, features, guidance=3.0), atol=1e-3)


def test_dropped_features_say_nothing():
    decoder = make_decoder()
    dropped = torch.tensor([True, True])
    condition = decoder.encode_condition(torch.randn(2, 6, 12), dropped)
    assert torch.equal(condition.hidden[0], condition.hidden[1])


@pytest.mark.parametrize("objective", ["flow", "v"])
def test_guess_is_the_posterior_of_a_gaussian(objective):
    """Against the linear regression of the target on the noisy value, over many draws."""
    path = DiffusionPath(objective)
    generator = torch.Generator().manual_seed(0)
    mean, deviation, time = torch.tensor(0.8), torch.tensor(0.4), torch.tensor(0.6)
    latents = mean + deviation * torch.randn(200_000, generator=generator)
    noise = torch.randn(200_000, generator=generator)
    noisy, target = path.mix(latents, noise, time), path.target(latents, noise, time)
    guess = path.guess(noisy, mean, deviation, time)
    error = target - guess.offset
    assert abs(error.mean()) < 0.01
    assert abs((error * noisy).mean()) < 0.01  # nothing linear is left
    assert torch.allclose(error.std(), guess.scale, rtol=0.02)


@pytest.mark.parametrize("tokens", [1, 4, 5, 9, 23])
def test_attention_in_blocks_is_banded_attention(tokens):
    torch.manual_seed(0)
    attention = LocalAttention(16, 2, window=4).eval()
    query, key, value = torch.randn(3, 1, 2, tokens, 8)
    positions = torch.arange(tokens)
    band = (positions[:, None] - positions).abs() <= 4
    whole = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=band)
    assert torch.allclose(attention._attend_in_blocks(query, key, value), whole, atol=1e-6)


def test_transformer_reaches_no_further_than_its_windows():
    torch.manual_seed(0)
    stack = ModulatedTransformer(dim=16, heads=2, window=3, feed_forward_dim=24, blocks=2).eval()
    hidden, modulation = torch.randn(1, 20, 16), torch.zeros(1, 6, 16)
    changed = hidden.clone()
    changed[:, 0] += 5
    difference = (stack(hidden, modulation) - stack(changed, modulation)).abs().amax(dim=-1)[0]
    assert (difference[:7] > 0).all() and (difference[7:] < 1e-6).all()


def test_start_is_the_gaussian_guess():
    """An untrained decoder already predicts the best linear denoising of unit Gaussian latents."""
    decoder = DiffusionDecoder(make_decoder().config)
    noisy, time = torch.randn(2, 6, 8), torch.tensor([0.2, 0.9])
    known = Known(latents=torch.zeros(2, 6, 8), mask=torch.zeros(2, 1, 8))
    condition = decoder.encode_condition(torch.randn(2, 4, 12))
    guess = decoder.path.guess(noisy, torch.tensor(0.0), torch.tensor(1.0), time[:, None, None])
    assert torch.allclose(decoder(noisy, time, condition, known), guess.offset, atol=1e-5)


def test_stored_decoder_is_the_same(tmp_path):
    decoder = make_decoder()
    decoder.tokenizer_fingerprint, decoder.vae_fingerprint = "aa", "bb"
    decoder.track = "vocal"
    decoder.save_pretrained(tmp_path / "decoder")
    loaded = DiffusionDecoder.from_pretrained(tmp_path / "decoder")
    assert loaded.fingerprint == decoder.fingerprint is not None
    features = torch.randn(1, 5, 12)
    assert torch.equal(draw(loaded, features), draw(decoder, features))
    loaded.require(tokenizer="aa", vae="bb")
    with pytest.raises(CheckpointError, match="tokenizer aa"):
        loaded.require(tokenizer="zz")
    loaded.require(track="vocal")
    with pytest.raises(CheckpointError, match="of the accompaniment is needed"):
        loaded.require(track="accompaniment")
    with pytest.raises(CheckpointError, match="VAE bb"):
        loaded.require(vae="zz")


@pytest.mark.parametrize(
    "settings", [{"dim": 15}, {"objective": "x"}, {"patch_frames": 3}, {"window_seconds": 0.0}, {"blocks": 0}]
)
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        DiffusionDecoderConfig(**settings)


def test_impossible_requests_are_refused():
    decoder = make_decoder()
    features = torch.randn(1, 4, 12)
    with pytest.raises(ConfigError, match="steps"):
        draw(decoder, features, steps=0)
    with pytest.raises(ConfigError, match="solver"):
        draw(decoder, features, solver="magic")
    with pytest.raises(ConfigError, match="at least one frame"):
        draw(decoder, features[:, :0])
    with pytest.raises(ConfigError, match=r"features \[batch, frames of 40 ms, 12\]"):
        draw(decoder, torch.randn(1, 4, 13))
    with pytest.raises(ConfigError, match="known_latents"):
        draw(decoder, features, known_latents=torch.zeros(1, 6, 9))
