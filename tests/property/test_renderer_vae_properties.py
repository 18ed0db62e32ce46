"""Properties of the spectral VAE for any length, level and chunking."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig

VAE = SpectralVAE(
    SpectralVAEConfig(decoder_blocks=1, dim=8, low_bins=400, group=16, phase_iterations=1)
).eval()


@settings(max_examples=15, deadline=None)
@given(
    samples=st.integers(1, 20_000), seed=st.integers(0, 2**31), gain=st.sampled_from([0.0, 1e-6, 0.1, 10.0])
)
@torch.no_grad()
def test_any_wave_goes_through_at_its_length(samples, seed, gain):
    wave = torch.randn(1, 2, samples, generator=torch.Generator().manual_seed(seed)) * gain
    latents = VAE.encode(wave)
    assert latents.shape == (1, 64, -(-samples // 960))
    found = VAE.decode(latents, samples)
    assert found.shape == wave.shape and bool(torch.isfinite(found).all())
    assert VAE.decode(latents).shape[-1] == latents.shape[-1] * VAE.hop_samples


@settings(max_examples=12, deadline=None)
@given(
    frames=st.integers(1, 160), chunk=st.integers(31, 120), cut=st.integers(0, 959), seed=st.integers(0, 99)
)
def test_any_chunking_gives_every_sample_once(frames, chunk, cut, seed):
    latents = torch.randn(64, frames, generator=torch.Generator().manual_seed(seed))
    samples = frames * 960 - cut
    counts: list[int] = []
    VAE.CHUNK_FRAMES = chunk
    wave = VAE.decode_song(latents, samples, counts.append)
    assert wave.shape == (2, samples) and bool(torch.isfinite(wave).all())
    assert sum(counts) == frames and min(counts) > 0
