"""The decoder runs in bfloat16 where the hardware multiplies it, and draws the same latents."""

import warnings

import pytest
import torch

from duotok.renderer.diffusion import DiffusionDecoder, DiffusionDecoderConfig
from duotok.renderer.renderer import Renderer
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.tokenizer.common import precision
from duotok.tokenizer.common.precision import multiplies_bf16, native_autocast


def render(monkeypatch, native: bool) -> torch.Tensor:
    monkeypatch.setattr(precision, "multiplies_bf16", lambda device: native)
    torch.manual_seed(0)
    config = DiffusionDecoderConfig(
        feature_dim=16, dim=32, heads=2, feed_forward_dim=64, blocks=2, condition_blocks=1, patch_frames=2
    )
    decoder = DiffusionDecoder(config).eval()
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    features = torch.randn(100, 16)
    vae = SpectralVAE(SpectralVAEConfig(low_bins=64, group=64, decoder_blocks=0))
    return Renderer(vae, {"accompaniment": decoder}).render_latents(features, steps=4, guidance=1.5, seed=3)


def test_bfloat16_draws_nearly_the_same_latents_without_a_warning(monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exact, cast = render(monkeypatch, False), render(monkeypatch, True)
    assert cast.dtype == exact.dtype == torch.float32
    error = (cast - exact).square().mean().sqrt() / exact.std()
    assert 1e-5 < error < 0.03  # bfloat16 rounds to 1 part in 256; below: it was not used


@pytest.mark.parametrize("native", [True, False])
def test_autocast_follows_the_processor(monkeypatch, native):
    for question in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, question, lambda: native)
    assert multiplies_bf16(torch.device("cpu")) is native
    assert not multiplies_bf16(torch.device("mps"))
    with native_autocast(torch.device("cpu")):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if native else torch.float32)


def test_autocast_does_nothing_on_other_devices():
    with native_autocast(torch.device("mps")):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.float32
