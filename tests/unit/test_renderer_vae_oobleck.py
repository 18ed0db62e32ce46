"""The Oobleck autoencoder behind the renderer's interface."""

import pytest
import torch

from duotok.renderer.vae_contract import Autoencoder
from duotok.renderer.vae_oobleck import OobleckVAE, OobleckVAEConfig
from duotok.tokenizer.common.errors import ConfigError


@pytest.fixture(scope="module")
def vae() -> OobleckVAE:
    torch.manual_seed(0)
    small = OobleckVAEConfig(latent_dim=8, decoder_width=4, channel_multiples=(1, 1, 1, 2, 2))
    return OobleckVAE(small).eval()


@pytest.mark.parametrize("samples", [960, 961, 9600])
@torch.no_grad()
def test_same_rates_and_shapes_as_the_spectral_one(vae: Autoencoder, samples):
    assert (vae.latent_rate_hz, vae.latent_dim, vae.hop_samples) == (50, 8, 960)
    latents = vae.encode(torch.randn(1, 2, samples) * 0.1)
    assert latents.shape == (1, 8, -(-samples // 960))
    assert vae.decode(latents, samples).shape == (1, 2, samples)


@torch.no_grad()
def test_store_and_load(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    loaded = OobleckVAE.from_pretrained(tmp_path / "vae")
    wave = torch.randn(1, 2, 4800) * 0.1
    assert loaded.fingerprint == vae.fingerprint
    assert torch.equal(loaded.encode(wave), vae.encode(wave))


def test_strides_and_widths_must_match():
    with pytest.raises(ConfigError, match="strides"):
        OobleckVAEConfig(strides=(2, 4))
