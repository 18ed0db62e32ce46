"""The spectral VAE: shapes, its linear coding, what survives of pitch and place, storage, errors."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.renderer.train_spectral_vae import fit_linear
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.spectrum import CODINGS, Stft, advance_phases, griffin_lim
from duotok.tokenizer.common.errors import CheckpointError, ConfigError

RATE = 48_000
SMALL: dict[str, Any] = {"decoder_blocks": 1, "dim": 8, "low_bins": 400, "group": 16, "phase_iterations": 4}


def play_chords(seed: int, seconds: float) -> Tensor:
    """Three decaying harmonic notes at a time, each at a place of its own: [2, samples]."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    wave = np.zeros((2, times.size))
    for onset in np.arange(0, seconds, 0.5):
        after = np.clip(times - onset, 0, None)
        for pitch in rng.choice(np.arange(48, 72), 3, replace=False):
            frequency = 440 * 2 ** ((pitch - 69) / 12)
            note = sum(np.sin(2 * np.pi * k * frequency * after) / k for k in range(1, 8)) * np.exp(
                -3 * after
            )
            place = rng.uniform()
            wave += np.stack([np.sqrt(1 - place) * note, np.sqrt(place) * note]) * 0.05
    return torch.from_numpy(wave).float()


@pytest.fixture(scope="module")
def vae() -> SpectralVAE:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SpectralVAE(SpectralVAEConfig(**SMALL))
    fit_linear(model, [play_chords(seed, 3.0) for seed in range(8)])
    return model.eval()


def level(wave: Tensor) -> Tensor:
    """Root mean square."""
    return wave.square().mean().sqrt()


def log_spectrum(wave: Tensor) -> Tensor:
    return (Stft(4096, 960)(wave[None])[0].abs() + 1e-2).log10()


@pytest.mark.parametrize("samples", [1, 959, 960, 961, 5000, 48_000])
@torch.no_grad()
def test_frames_cover_the_samples_and_the_length_comes_back(vae, samples):
    wave = play_chords(1, 1.0)[None, :, :samples].repeat(2, 1, 1)
    latents = vae.encode(wave)
    assert latents.shape == (2, 64, -(-samples // 960))
    assert vae.decode(latents, samples).shape == (2, 2, samples)
    assert vae.decode(latents).shape[-1] == latents.shape[-1] * 960
    assert torch.isfinite(vae.decode(latents)).all()


@torch.no_grad()
def test_interface_numbers(vae):
    assert (vae.latent_rate_hz, vae.latent_dim, vae.hop_samples) == (50, 64, 960)


@torch.no_grad()
def test_latents_are_about_unit_scale_and_silence_is_finite(vae):
    latents = torch.cat([vae.encode(play_chords(seed, 3.0)[None])[0] for seed in range(8)], dim=1)
    assert latents.mean(dim=1).abs().max() < 0.05
    assert latents.std(dim=1).median().item() == pytest.approx(1, abs=0.05)
    silence = vae.decode(vae.encode(torch.zeros(1, 2, 9600)))
    assert torch.isfinite(silence).all() and silence.abs().max() < 0.05


@torch.no_grad()
def test_correction_starts_at_zero_and_coding_is_a_projection(vae):
    features = vae.features(play_chords(3, 2.0)[None])
    once = vae.decode_features(vae.encode_features(features))
    twice = vae.decode_features(vae.encode_features(once))
    torch.testing.assert_close(once, twice, rtol=1e-3, atol=1e-3)
    pooled = vae.features.pooled.dim
    missed, there = (
        (x[..., :pooled] * vae.feature_weight[:pooled]).var() for x in (features - once, features)
    )
    assert missed < 0.1 * there


@torch.no_grad()
def test_partials_and_level_survive_on_unseen_chords(vae):
    wave = play_chords(100, 3.0)
    found = vae.decode(vae.encode(wave[None]), wave.shape[1])[0]
    bins = slice(5, 256)  # 60 to 3000 Hz
    first, second = log_spectrum(wave.mean(0))[bins], log_spectrum(found.mean(0))[bins]
    first, second = first - first.mean(0), second - second.mean(0)
    correlation = (first * second).sum(0) / (first.norm(dim=0) * second.norm(dim=0) + 1e-6)
    assert correlation.mean() > 0.7
    assert 0.7 < level(found) / level(wave) < 1.3


@pytest.mark.parametrize("side", [0, 1])
@pytest.mark.parametrize("coding", CODINGS)
@torch.no_grad()
def test_a_sound_stays_on_its_side(side, coding):
    vae = SpectralVAE(SpectralVAEConfig(**SMALL, side_coding=coding)).eval()
    fit_linear(vae, [play_chords(seed, 1.0) for seed in range(8)])
    wave = play_chords(7, 2.0).mean(dim=0)
    stereo = torch.stack([wave, 0.2 * wave] if side == 0 else [0.2 * wave, wave])
    found = vae.decode(vae.encode(stereo[None]), stereo.shape[1])[0]
    assert level(found[side]) > 1.15 * level(found[1 - side])


@torch.no_grad()
def test_song_in_chunks_sounds_like_one_pass_without_clicks(vae, monkeypatch):
    monkeypatch.setattr(vae, "CHUNK_FRAMES", 80)
    wave = play_chords(9, 6.0)
    samples = wave.shape[1] - 321
    latents = vae.encode(wave[None])[0]
    counts: list[int] = []
    chunked = vae.decode_song(latents, samples, counts.append)
    whole = vae.decode(latents[None], samples)[0]
    assert chunked.shape == (2, samples) and sum(counts) == latents.shape[1] and len(counts) > 3
    rough = chunked.diff(n=2).abs().max() / whole.diff(n=2).abs().max()
    assert rough < 1.3
    # Level of every 20 ms, where there is sound: no dip where chunks meet.
    blocks = [
        w[:, : samples // 960 * 960].unflatten(1, (-1, 960)).square().mean(dim=(0, 2))
        for w in (chunked, whole)
    ]
    audible = blocks[1] > 0.01 * blocks[1].mean()
    assert (blocks[0] / blocks[1])[audible].log10().abs().max() < 0.3  # 3 dB
    assert (log_spectrum(chunked[0]) - log_spectrum(whole[0])).abs().mean() < 0.1


@torch.no_grad()
def test_short_song_is_the_one_pass_result(vae):
    latents = vae.encode(play_chords(2, 2.0)[None])
    assert torch.equal(vae.decode_song(latents[0], 90_001), vae.decode(latents, 90_001)[0])


def test_phase_start_and_iterations_bring_a_tone_back():
    stft = Stft(4096, 960)
    wave = play_chords(4, 2.0)[:1]
    magnitudes = stft(wave).abs()

    def miss(found: Tensor) -> float:
        return float((stft(found).abs() - magnitudes).norm() / magnitudes.norm())

    assert stft.inverse(stft(wave)).sub(wave).abs().max() < 1e-4
    start = miss(stft.inverse(torch.polar(magnitudes, advance_phases(magnitudes, stft))))
    random = torch.polar(magnitudes, torch.rand(magnitudes.shape) * 6.28)
    assert start < 0.5 * miss(stft.inverse(random))
    assert miss(griffin_lim(magnitudes, stft, iterations=16)) < 0.7 * start


def test_held_frames_keep_their_sound():
    stft = Stft(4096, 960)
    wave = functional.pad(play_chords(4, 2.0)[:1], (12 * 960, 0))
    spectrum = stft(wave)
    found = griffin_lim(spectrum.abs(), stft, iterations=4, held=spectrum[..., :50])
    inside = 45 * 960
    assert (found - wave)[:, :inside].abs().max() < 1e-3
    # The phases go on from the held ones, so the wave stays right for a while (the next chord starts later).
    later = slice(50 * 960, 54 * 960)
    assert (found - wave)[:, later].norm() < 0.5 * wave[:, later].norm()


def test_store_and_load(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    loaded = SpectralVAE.from_pretrained(tmp_path / "vae")
    assert loaded.fingerprint == vae.fingerprint and loaded.config == vae.config
    wave = play_chords(6, 0.5)[None]
    with torch.no_grad():
        assert torch.equal(loaded.decode(loaded.encode(wave)), vae.decode(vae.encode(wave)))
    vae.save_pretrained(tmp_path / "half", half=True)
    half = SpectralVAE.from_pretrained(tmp_path / "half")
    with torch.no_grad():
        assert (half.encode(wave) - vae.encode(wave)).abs().max() < 0.1
    with pytest.raises(CheckpointError):
        SpectralVAE.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"power": 0.0},
        {"kernel_frames": 4},
        {"hop_samples": 2048},
        {"low_bins": 2048},
        {"mid_latents": 0},
        {"decoder_blocks": -1},
    ],
)
def test_wrong_settings_are_named(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        SpectralVAEConfig(**wrong)


def test_wrong_shapes_are_refused(vae):
    with pytest.raises(ConfigError, match="wave"):
        vae.encode(torch.zeros(1, 1, 960))
    with pytest.raises(ConfigError, match="latents"):
        vae.decode(torch.zeros(1, 63, 10))
    with pytest.raises(ConfigError, match="samples"):
        vae.decode(torch.zeros(1, 64, 10), 9601)
    with pytest.raises(ConfigError, match="samples"):
        vae.decode_song(torch.zeros(64, 10), 0)
