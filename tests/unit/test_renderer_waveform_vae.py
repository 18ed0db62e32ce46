"""The Oobleck autoencoder behind the renderer's interface: other rates, long songs, folders."""

import json
from typing import Any

import pytest
import soxr
import torch
from torch.nn import functional

from duotok.renderer import autoencoder
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.renderer import Renderer, open_vae
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.waveform_vae import LatentTransformer, OobleckVAE, OobleckVAEConfig
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

RESAMPLED: dict[str, Any] = {"sample_rate_hz": 44_100, "strides": (2, 4, 4, 4, 8)}


def make_vae(**settings: Any) -> OobleckVAE:
    torch.manual_seed(0)
    small = {"latent_dim": 8, "decoder_width": 4, "channel_multiples": (1, 1, 1, 2, 2)}
    vae = OobleckVAE(OobleckVAEConfig(**(small | settings))).eval()
    if vae.transformer is not None:
        randomize(vae.transformer)
    return vae


def randomize(transformer: LatentTransformer) -> LatentTransformer:
    """Its branches start silent."""
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return transformer


@pytest.fixture(scope="module")
def vae() -> OobleckVAE:
    return make_vae()


@pytest.fixture(scope="module")
def ear_vae() -> OobleckVAE:
    """At 44.1 kHz, with a transformer before the decoder."""
    return make_vae(**RESAMPLED, transformer_blocks=2, head_dim=4)


@pytest.mark.parametrize("samples", [960, 961, 9600])
@torch.no_grad()
def test_same_rates_and_shapes_as_the_spectral_one(vae: Autoencoder, samples):
    assert (vae.latent_rate_hz, vae.latent_dim, vae.hop_samples) == (50, 8, 960)
    latents = vae.encode(torch.randn(1, 2, samples) * 0.1)
    assert latents.shape == (1, 8, -(-samples // 960))
    assert vae.decode(latents, samples).shape == (1, 2, samples)


@pytest.mark.parametrize("samples", [1, 1114, 1115, 20_000, 48_001])
@torch.no_grad()
def test_another_rate_keeps_the_length_of_a_wave(ear_vae, samples):
    wave = torch.randn(1, 2, samples) * 0.1
    latents = ear_vae.encode(wave)
    assert latents.shape == (1, 8, -(-samples * 147 // 160 // 1024) or 1)
    decoded = ear_vae.decode(latents, samples)
    assert decoded.shape == (1, 2, samples) and decoded.isfinite().all()
    assert ear_vae.decode(latents).shape[-1] == latents.shape[-1] * 1024 * 160 // 147


@torch.no_grad()
def test_the_network_hears_and_gives_its_own_rate(ear_vae):
    wave = torch.randn(2, 2, 9600) * 0.1
    own = torch.stack([torch.from_numpy(soxr.resample(each.T.numpy(), 48_000, 44_100).T) for each in wave])
    own = functional.pad(own, (0, -own.shape[-1] % 1024))
    latents = ear_vae.encode(wave)
    torch.testing.assert_close(latents, ear_vae.model.encoder(own).chunk(2, dim=1)[0])
    assert ear_vae.transformer is not None
    raw = ear_vae.model.decoder(ear_vae.transformer(latents))[0]
    expected = torch.from_numpy(soxr.resample(raw.T.numpy(), 44_100, 48_000).T)[:, :9600]
    torch.testing.assert_close(ear_vae.decode(latents, 9600)[0], expected)


@pytest.mark.parametrize("strides", [(2, 4, 4, 5, 6), (2, 2, 4, 6, 10), (2, 4, 4, 4, 8)])
def test_reach_is_as_far_as_a_sample_sees(strides):
    vae, frames, middle = make_vae(strides=strides), 41, 20
    seen = 0
    for inside in (0, vae.hop_samples // 2, vae.hop_samples - 1):
        latents = torch.randn(1, 8, frames, requires_grad=True)
        vae._convolve(latents)[0, :, middle * vae.hop_samples + inside].sum().backward()
        assert latents.grad is not None
        touched = latents.grad.abs().sum(dim=(0, 1)).nonzero().flatten() - middle
        seen = max(seen, int(touched.abs().max()))
    assert vae.reach_frames - 1 <= seen <= vae.reach_frames < middle


@pytest.mark.parametrize("frames", [1, 19, 20, 21, 70])
@pytest.mark.parametrize("settings", [{}, RESAMPLED])
@torch.no_grad()
def test_a_song_in_chunks_is_the_song_in_one_pass(monkeypatch, settings, frames):
    monkeypatch.setattr(OobleckVAE, "CHUNK_FRAMES", 20)
    vae, latents = make_vae(**settings), torch.randn(8, frames)
    whole = vae.decode(latents[None])[0]
    reported: list[int] = []
    samples = whole.shape[-1] - 123
    chunked = vae.decode_song(latents, samples, reported.append)
    assert whole.std() > 1e-3
    torch.testing.assert_close(chunked, whole[:, :samples], rtol=1e-4, atol=1e-6)
    assert sum(reported) == frames and max(reported) <= 20
    with pytest.raises(ConfigError, match="latent frames give"):
        vae.decode_song(latents, 48_000 * 10)


@pytest.mark.parametrize(
    "vae",
    [
        make_vae(),
        make_vae(**RESAMPLED),
        SpectralVAE(SpectralVAEConfig(low_bins=64, group=64, encoder_blocks=2, dim=8, decoder_blocks=0)),
    ],
)
@pytest.mark.parametrize("samples", [1, 47_999, 48_960, 100_007])
@torch.no_grad()
def test_a_song_is_encoded_in_chunks_as_in_one_pass(monkeypatch, vae, samples):
    monkeypatch.setattr(autoencoder, "ENCODER_CHUNK_SECONDS", 1)
    for parameter in vae.parameters() if isinstance(vae, SpectralVAE) else ():
        torch.nn.init.normal_(parameter, std=0.1)
    wave = torch.randn(2, samples)
    latents = vae.encode_song(wave)
    assert latents.std() > 1e-3 or samples == 1
    torch.testing.assert_close(latents, vae.encode(wave[None])[0], rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_windows_of_the_transformer_fade_into_each_other():
    torch.manual_seed(0)
    transformer = randomize(LatentTransformer(dim=16, head_dim=8, blocks=2))
    latents = torch.randn(1, 16, 25)
    assert torch.equal(transformer.in_windows(latents, 25, 3), transformer(latents))
    found = transformer.in_windows(latents, 10, 3)
    first, second = transformer(latents[..., :10]), transformer(latents[..., 7:17])
    assert found.shape == latents.shape
    torch.testing.assert_close(found[..., :7], first[..., :7])
    torch.testing.assert_close(found[..., 8], (first[..., 8] + second[..., 1]) / 2)
    torch.testing.assert_close(found[..., 10:14], second[..., 3:7])
    torch.testing.assert_close(found[..., 18:], transformer(latents[..., 15:])[..., 3:])


@torch.no_grad()
def test_a_song_with_a_transformer_in_one_window_is_exact(monkeypatch, ear_vae):
    monkeypatch.setattr(OobleckVAE, "CHUNK_FRAMES", 20)
    latents = torch.randn(8, 45)
    whole = ear_vae.decode(latents[None], 48_000)[0]
    torch.testing.assert_close(ear_vae.decode_song(latents, 48_000), whole, rtol=1e-3, atol=1e-3)
    monkeypatch.setattr(OobleckVAE, "WINDOW_SECONDS", 0.5)
    monkeypatch.setattr(OobleckVAE, "OVERLAP_SECONDS", 0.1)
    long = ear_vae.decode_song(latents, 48_000)
    assert long.shape == (2, 48_000) and long.isfinite().all()


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"transformer_blocks": -1}, "transformer_blocks"),
        ({"transformer_blocks": 1, "head_dim": 48}, "head_dim"),
        ({"transformer_blocks": 1, "head_dim": 2}, "head_dim"),
        ({"strides": (1, 4, 4, 5, 6)}, "strides"),
        ({"strides": (2, 4)}, "strides"),
        ({"sample_rate_hz": 0}, "sample_rate_hz"),
    ],
)
def test_settings_out_of_range_are_named(settings, told):
    with pytest.raises(ConfigError, match=told):
        OobleckVAEConfig(**settings)


def test_a_folder_opens_by_its_kind(tmp_path):
    spectral = SpectralVAE(
        SpectralVAEConfig(low_bins=64, group=64, decoder_blocks=0, mid_latents=6, side_latents=2)
    )
    for name, vae in (("spectral", spectral), ("oobleck", make_vae())):
        vae.save_pretrained(tmp_path / name)
        opened = open_vae(tmp_path / name)
        assert type(opened) is type(vae) and opened.fingerprint == vae.fingerprint
    path = tmp_path / "oobleck" / "config.json"
    for kind in ("dual_track_lm", None, ["oobleck_vae"]):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kind": kind}))
        with pytest.raises(CheckpointError, match="spectral_vae or oobleck_vae"):
            open_vae(tmp_path / "oobleck")
    path.write_text("{")
    with pytest.raises(CheckpointError, match="JSON"):
        open_vae(tmp_path / "oobleck")
    with pytest.raises(CheckpointError, match="missing"):
        open_vae(tmp_path / "nowhere")


def test_the_renderer_takes_any_autoencoder_of_its_rate(tmp_path, ear_vae):
    torch.manual_seed(0)
    config = DiffusionDecoderConfig(
        feature_dim=4, latent_dim=8, dim=8, heads=1, feed_forward_dim=8, blocks=1, condition_blocks=1
    )
    DiffusionDecoder(config).save_pretrained(tmp_path / "accompaniment")
    make_vae().save_pretrained(tmp_path / "vae")
    renderer = Renderer.from_pretrained(tmp_path).to("cpu")
    latents = renderer.render_latents(torch.randn(30, 4), steps=1, guidance=1.0, seed=0)
    assert renderer.decode(latents, 30 * 1920 - 7).shape == (2, 30 * 1920 - 7)
    with pytest.raises(CheckpointError, match=r"8 latents at 50 Hz, the VAE has 8 at 43.0664 Hz"):
        Renderer(ear_vae, renderer.decoders)
