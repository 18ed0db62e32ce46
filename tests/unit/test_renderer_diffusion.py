"""The diffusion decoder: solver, sampling, in-painting, guidance, precision, storing, local attention."""

import warnings

import pytest
import torch

from duotok.renderer.diffusion import (
    DiffusionDecoder,
    DiffusionDecoderConfig,
    Known,
    ModulatedTransformer,
)
from duotok.renderer.diffusion_path import OBJECTIVES, DiffusionPath, Solver
from duotok.renderer.renderer import Renderer
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common import precision
from duotok.tokenizer.common.errors import CheckpointError, ConfigError
from duotok.tokenizer.common.precision import multiplies_bf16, native_autocast


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


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("patch_frames", [1, 2])
def test_sampling_follows_the_seed_only(objective, patch_frames):
    decoder = make_decoder(objective=objective, patch_frames=patch_frames)
    features = torch.randn(2, 9, 12)
    first = draw(decoder, features)
    torch.manual_seed(99)
    assert first.shape == (2, 6, 18) and first.isfinite().all()
    assert torch.equal(first, draw(decoder, features))
    assert not torch.allclose(first, draw(decoder, features, seed=1))


@pytest.mark.parametrize("objective", OBJECTIVES)
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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_between_two_known_parts_the_rest_listens_to_both(objective):
    decoder, features = make_decoder(objective=objective), torch.randn(2, 9, 12)
    before, after = torch.randn(2, 6, 4), torch.randn(2, 6, 5)
    latents = draw(decoder, features, known_latents=before, latents_after=after)
    assert torch.equal(latents[:, :, :4], before) and torch.equal(latents[:, :, 13:], after)
    for other in ({"known_latents": before + 1, "latents_after": after}, {"known_latents": before}):
        assert not torch.allclose(latents[:, :, 4:13], draw(decoder, features, **other)[:, :, 4:13])
    with pytest.raises(ConfigError, match="latents_after"):
        draw(decoder, features, latents_after=torch.zeros(2, 6, 19))


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


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_guess_is_the_posterior_of_a_gaussian(objective):
    """Against the linear regression of the target on the noisy value, over many draws."""
    path = DiffusionPath(objective)
    generator = torch.Generator().manual_seed(0)
    mean, deviation, time = torch.tensor(0.8), torch.tensor(0.4), torch.tensor(0.6)
    latents = mean + deviation * torch.randn(200_000, generator=generator)
    noise = torch.randn(200_000, generator=generator)
    noisy, target = path.mix(latents, noise, time), path.target(latents, noise, time)
    offset, scale = path.guess(noisy, mean, deviation, time)
    error = target - offset
    assert abs(error.mean()) < 0.01
    assert abs((error * noisy).mean()) < 0.01  # nothing linear is left
    assert torch.allclose(error.std(), scale, rtol=0.02)


def walk(objective: str, deviation: float, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and where the exact prediction for Gaussian latents of mean 0.5 leads it."""
    path, solver = DiffusionPath(objective), Solver(objective, steps)
    noise = latents = torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(0))
    assert len(solver.times) == steps and (solver.times.diff() <= 0).all()
    assert 0 < solver.times.min() and solver.times.max() <= 1
    mean, spread = torch.tensor(0.5), torch.tensor(deviation)
    for run, time in enumerate(solver.times):
        prediction = path.guess(latents, mean, spread, time)[0]
        latents = solver.step(prediction, run, latents, mean, spread)
    return noise, latents


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_the_solver_walks_to_the_exact_solution(objective):
    for steps in (1, 2, 8):  # one point is found in any number of steps
        assert (walk(objective, 1e-3, steps)[1] - 0.5).abs().max() < 0.01

    def error(steps: int) -> float:
        """Of Gaussian latents the exact end of the walk is mean + deviation * noise."""
        noise, latents = walk(objective, 0.3, steps)
        return float((latents - (0.5 + 0.3 * noise)).abs().mean())

    errors = [error(steps) for steps in (3, 9, 50)]
    if objective == "flow":
        assert max(errors) < 1e-5  # what the guess says is walked exactly in any number of steps
    else:
        assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.015


def test_a_walk_by_a_wrong_guess_ends_where_a_fine_one_does():
    """Latents of two points, told by a network that knows them, under a guess of one Gaussian."""
    path, points = DiffusionPath("flow"), torch.tensor([-0.6, 1.1])
    mean, spread = torch.tensor(0.2), torch.tensor(0.9)

    def walk_to(steps: int) -> torch.Tensor:
        solver, latents = Solver("flow", steps), torch.randn(500, generator=torch.Generator().manual_seed(0))
        for run, time in enumerate(solver.times):
            signal, level = path.levels(time)
            nearness = -((latents[:, None] - signal * points) ** 2) / (2 * level**2)
            expected = (nearness.softmax(dim=1) * points).sum(dim=1)
            prediction = (latents - signal * expected) / level - expected
            latents = solver.step(prediction, run, latents, mean, spread)
        return latents

    fine = walk_to(400)
    assert (fine[:, None] - points).abs().min(dim=1).values.median() < 0.02  # it ends at one of them
    errors = [float((walk_to(steps) - fine).abs().mean()) for steps in (5, 20, 80)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2]


def test_steps_of_straight_paths_are_shorter_the_later_they_come():
    times = torch.cat([Solver("flow", 4).times, torch.zeros(1)])
    assert (times.diff().abs().diff() < 0).all()


def test_only_straight_paths_are_carried():
    zero, one = torch.zeros(1), torch.ones(1)
    with pytest.raises(ConfigError, match="straight paths"):
        DiffusionPath("v").carry(zero, zero, zero, one, torch.tensor(0.5), torch.tensor(0.25))


def test_v_levels_are_those_of_the_solver():
    solver = Solver("v", 10)
    signal, _ = DiffusionPath("v").levels(solver.times.float())
    scheduler = solver._scheduler
    assert torch.allclose(signal, scheduler.alphas_cumprod[scheduler.timesteps].sqrt(), atol=1e-3)


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
    offset, _ = decoder.path.guess(noisy, torch.tensor(0.0), torch.tensor(1.0), time[:, None, None])
    assert torch.allclose(decoder(noisy, time, condition, known), offset, atol=1e-5)


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
    with pytest.raises(ConfigError, match="at least one frame"):
        draw(decoder, features[:, :0])
    with pytest.raises(ConfigError, match=r"features \[batch, frames of 40 ms, 12\]"):
        draw(decoder, torch.randn(1, 4, 13))
    with pytest.raises(ConfigError, match="known_latents"):
        draw(decoder, features, known_latents=torch.zeros(1, 6, 9))


def test_bfloat16_draws_nearly_the_same_latents_without_a_warning(monkeypatch):
    decoder = make_decoder(feature_dim=16, latent_dim=64, dim=32, feed_forward_dim=64, blocks=2)
    vae = SpectralVAE(SpectralVAEConfig(low_bins=64, group=64, decoder_blocks=0))
    renderer, features = Renderer(vae, {"accompaniment": decoder}), torch.randn(100, 16)
    found = []
    for native in (False, True):
        monkeypatch.setattr(precision, "multiplies_bf16", lambda device, native=native: native)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found.append(renderer.render_latents(features, steps=4, guidance=1.5, seed=3))
    exact, cast = found
    assert cast.dtype == exact.dtype == torch.float32
    error = (cast - exact).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.03  # bfloat16 rounds to 1 part in 256; below: it was not used


@pytest.mark.parametrize("native", [True, False])
def test_autocast_follows_the_processor(monkeypatch, native):
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: native)
    assert multiplies_bf16(torch.device("cpu")) is native
    for device in ("cpu", "mps"):
        with native_autocast(torch.device(device)):
            product = torch.ones(2, 2) @ torch.ones(2, 2)
        wanted = torch.bfloat16 if native and device == "cpu" else torch.float32
        assert product.dtype == wanted
