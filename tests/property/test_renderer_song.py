"""Songs of any length: the windows cover them once, the latents have exactly the right number of frames."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.renderer import OVERLAP_FRAMES, WINDOW_FRAMES, Renderer, plan_windows
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError


@settings(deadline=None)
@given(st.integers(1, 20_000), st.integers(2, 800), st.data())
def test_windows_cover_every_frame_once(frames, window, data):
    overlap = data.draw(st.integers(0, window - 1))
    windows = plan_windows(frames, window, overlap)
    done = 0
    for number, part in enumerate(windows):
        assert part.start + part.known == done and part.stop > done
        assert part.known == (0 if number == 0 else min(overlap, done))
        assert part.stop - part.start <= window
        done = part.stop
    assert done == frames
    own = [part.stop - part.start - part.known for part in windows[1:]]
    assert not own or max(own) - min(own) <= 1


def test_windows_are_thirty_seconds_with_three_of_overlap():
    assert plan_windows(1)[0] == (0, 1, 0)
    assert [len(plan_windows(frames)) for frames in (750, 751, 1425, 1426)] == [1, 2, 2, 3]
    assert all(part.known == OVERLAP_FRAMES for part in plan_windows(10_000)[1:])
    with pytest.raises(ConfigError, match="at least 1"):
        plan_windows(0)
    with pytest.raises(ConfigError, match="overlap"):
        plan_windows(10, 5, 5)


def make_decoder() -> DiffusionDecoder:
    torch.manual_seed(0)
    decoder = DiffusionDecoder(
        DiffusionDecoderConfig(
            feature_dim=4, dim=8, heads=1, feed_forward_dim=8, blocks=1, condition_blocks=1, patch_frames=2,
            window_seconds=1.0,
        )
    ).eval()  # fmt: skip
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return decoder


def make_vae(**settings) -> SpectralVAE:
    return SpectralVAE(SpectralVAEConfig(low_bins=64, group=64, decoder_blocks=0, **settings))


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(make_vae(), {"accompaniment": make_decoder()})


@settings(max_examples=10, deadline=None)
@given(st.integers(1, 2 * WINDOW_FRAMES + 200), st.integers(0, 2**31))
def test_latents_are_exactly_as_long_as_the_song(renderer, frames, seed):
    reported: list[int] = []
    features = torch.ones(frames, 4)
    latents = renderer.render_latents(features, steps=1, guidance=1.0, seed=seed, progress=reported.append)
    assert latents.shape == (64, 2 * frames) and latents.isfinite().all()
    assert sum(reported) == frames


def test_rendering_depends_on_the_seed_alone(renderer):
    features = torch.randn(900, 4)

    def render(seed):
        return renderer.render_latents(features, steps=2, guidance=2.0, seed=seed)

    first = render(3)
    torch.manual_seed(5)
    assert torch.equal(first, render(3))
    assert not torch.allclose(first, render(4))


def test_each_window_continues_the_one_before(renderer, monkeypatch):
    """The known latents given to a window are the last ones of the song so far."""
    decoder = renderer.decoders["accompaniment"]
    seen = []
    sample = decoder.sample

    def watch(features, *, known_latents=None, **settings):
        latents = sample(features, known_latents=known_latents, **settings)
        seen.append((known_latents, latents))
        return latents

    monkeypatch.setattr(decoder, "sample", watch)
    song = renderer.render_latents(torch.randn(1600, 4), steps=1, guidance=1.0, seed=0)
    assert len(seen) == 3 and seen[0][0] is None
    end = seen[0][1].shape[2]
    for known, latents in seen[1:]:
        assert known.shape[2] == 2 * OVERLAP_FRAMES
        assert torch.equal(known[0], song[:, end - 2 * OVERLAP_FRAMES : end])
        end += latents.shape[2] - 2 * OVERLAP_FRAMES
        assert torch.equal(latents[0], song[:, end - latents.shape[2] : end])


def test_parts_of_different_bundles_are_refused():
    decoder = make_decoder()
    decoder.vae_fingerprint, decoder.tokenizer_fingerprint = "another", "tokenizer"
    vae = make_vae()
    vae.fingerprint = "vae"
    with pytest.raises(CheckpointError, match="VAE another"):
        Renderer(vae, {"accompaniment": decoder})
    decoder.vae_fingerprint = "vae"
    renderer = Renderer(vae, {"accompaniment": decoder})
    renderer.require_tokenizer("tokenizer")
    with pytest.raises(CheckpointError, match="tokenizer tokenizer"):
        renderer.require_tokenizer("another")
    with pytest.raises(ConfigError, match="vocal"):
        renderer.render_latents(torch.zeros(3, 4), steps=1, guidance=1.0, seed=0, track="vocal")


@pytest.mark.parametrize("autoencoder", [{"mid_latents": 20}, {"hop_samples": 1024}])
def test_an_autoencoder_of_another_size_or_rate_is_refused(autoencoder):
    with pytest.raises(
        CheckpointError, match=r"makes 64 latents at 50 Hz, the VAE has (26|64) at (50|46.875) Hz"
    ):
        Renderer(make_vae(**autoencoder), {"accompaniment": make_decoder()})


@pytest.mark.parametrize("latents", [torch.zeros(32, 10), torch.zeros(1, 64, 10), torch.zeros(64)])
def test_latents_of_another_shape_are_refused(renderer, latents):
    with pytest.raises(ConfigError, match=r"latents \[64, frames\]"):
        renderer.decode(latents, 960)


def test_nothing_to_render_is_told(renderer):
    with pytest.raises(ConfigError, match="at least 1 frame"):
        renderer.render_latents(torch.zeros(0, 4), steps=1, guidance=1.0, seed=0)
    with pytest.raises(ConfigError, match="steps must be at least 1"):
        renderer.render_latents(torch.zeros(3, 4), steps=0, guidance=1.0, seed=0)
