"""The shipped autoencoder's latents move smoothly in time: what lies between two frames can be foreseen."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional

from duotok.recipes.accompany.bundle import default_bundle
from duotok.recipes.evaluation.audio_metrics import compare_spectra
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ, read_audio

VOCAL = Path(__file__).parents[2] / "examples" / "vocal.wav"
EDGE = 8  # frames at each end that the padding of the analysis reaches


@pytest.fixture(scope="module")
def vae() -> SpectralVAE:
    return SpectralVAE.from_pretrained(default_bundle() / "renderer" / "vae")


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    return read_audio(VOCAL)[:, 2 * SAMPLE_RATE_HZ : 6 * SAMPLE_RATE_HZ]


@pytest.fixture(scope="module")
def latents(vae, wave) -> torch.Tensor:
    with torch.no_grad():
        return vae.encode(wave[None])[0]


@torch.no_grad()
def test_a_delay_of_whole_frames_delays_the_latents(vae, wave, latents):
    delayed = vae.encode(functional.pad(wave, (3 * vae.hop_samples, 0))[None])[0]
    inside = slice(EDGE, latents.shape[1] - EDGE)
    assert torch.allclose(delayed[:, 3:][:, inside], latents[:, inside], atol=1e-4)


@torch.no_grad()
def test_a_delay_of_half_a_frame_lands_between_the_neighbours(vae, wave, latents):
    delayed = vae.encode(functional.pad(wave, (vae.hop_samples // 2, 0))[None])[0][:, 1 : latents.shape[1]]
    between = (latents[:, :-1] + latents[:, 1:]) / 2
    inside = slice(EDGE, between.shape[1] - EDGE)
    error = (delayed - between)[:, inside].square().mean()
    assert error < 0.2 * latents.var(dim=1).mean()


@torch.no_grad()
def test_every_second_frame_can_be_interpolated(vae, wave, latents):
    halved = latents.clone()
    count = (latents.shape[1] - 1) // 2
    halved[:, 1 : 2 * count : 2] = (latents[:, 0 : 2 * count : 2] + latents[:, 2 : 2 * count + 1 : 2]) / 2
    whole, sparse = (
        compare_spectra(wave, vae.decode(each[None], wave.shape[1])[0]) for each in (latents, halved)
    )
    assert sparse["chroma_correlation"] > whole["chroma_correlation"] - 0.05
    assert sparse["fine_structure_300_1000_hz"] > whole["fine_structure_300_1000_hz"] - 0.1
    assert sparse["log10_mel_l1"] < whole["log10_mel_l1"] + 0.1
