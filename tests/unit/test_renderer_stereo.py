"""The VAE whose side is coded in bands: width, level, place, smooth latents."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from duotok.recipes.evaluation.audio_metrics import loudness_difference_lu, stereo_width_db
from duotok.recipes.renderer.train_spectral_vae import fit_energy_gains, fit_linear
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.spectrum import BANDS, StereoFeatures, band_filters
from duotok.tokenizer.common.errors import ConfigError, DataError

RATE = 48_000
SMALL: dict[str, Any] = {"decoder_blocks": 1, "dim": 8, "low_bins": 400, "group": 16, "phase_iterations": 4}
CODED: dict[str, Any] = {
    **SMALL,
    "mid_latents": 56,
    "side_latents": 8,
    "side_coding": BANDS,
    "energy_gains": True,
}


def play_band(seed: int, seconds: float) -> Tensor:
    """Three panned chords and a wide noise an octave up: [2, samples]."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * RATE)) / RATE
    wave = np.zeros((2, times.size))
    for pitch in rng.choice([45, 48, 52, 57, 60, 64], 3, replace=False):
        frequency = 440 * 2 ** ((pitch - 69) / 12)
        note = sum(np.sin(2 * np.pi * k * frequency * times + rng.uniform(0, 6)) / k for k in range(1, 8))
        place = rng.uniform()
        wave += np.stack([np.sqrt(1 - place) * note, np.sqrt(place) * note]) * 0.05
    breath = 0.5 + 0.5 * np.sin(2 * np.pi * 2 * times + rng.uniform(0, 6))
    wave += rng.normal(size=wave.shape) * 0.01 * breath
    return torch.from_numpy(wave).float()


@pytest.fixture(scope="module")
def waves() -> list[Tensor]:
    """Three times as many sounds as the coding has side latents: of fewer it learns those by heart."""
    return [play_band(seed, 1.0) for seed in range(24)]


@pytest.fixture(scope="module")
def vae(waves) -> SpectralVAE:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = SpectralVAE(SpectralVAEConfig(**CODED))
    fit_linear(model, waves)
    fit_energy_gains(model, waves)
    return model.eval()


@torch.no_grad()
def through(vae: SpectralVAE, wave: Tensor) -> Tensor:
    return vae.decode(vae.encode(wave[None]), wave.shape[1])[0]


def test_bands_share_every_bin_and_are_narrower_below():
    frequencies = torch.linspace(0, RATE / 2, 2049)
    filters = band_filters(frequencies, 32)
    torch.testing.assert_close(filters.sum(dim=1), torch.ones(2049))
    width = (filters > 0).sum(dim=0)[1:-1]
    assert (width.diff() >= -1).all() and width[-1] > 8 * width[0]


@pytest.mark.parametrize(
    ("left", "right", "with_mid", "beside"), [(1, 1, 0, 0), (1, 0, 1, 0), (0, 1, -1, 0), (1, 0.5, 1 / 3, 0)]
)
def test_gains_of_a_panned_tone_are_its_place(left, right, with_mid, beside):
    features = StereoFeatures(
        fft_size=4096, hop_samples=960, low_bins=700, group=4, power=0.2, coding=BANDS, bands=32
    )
    tone = torch.sin(torch.arange(RATE) * (2 * np.pi * 440 / RATE)) * 0.1
    gains = features(torch.stack([left * tone, right * tone])[None])[0, 20, features.mid_dim :].unflatten(
        0, (2, 32)
    )
    band = int(features.band_filters[round(440 * 4096 / RATE)].argmax())
    assert gains[0, band].item() == pytest.approx(with_mid, abs=0.01)
    assert gains[1, band].item() == pytest.approx(beside, abs=0.05)


def test_unrelated_channels_are_as_wide_as_high(vae):
    noise = torch.randn(1, 2, RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    gains = vae.features(noise)[0, 5:-5, vae.features.mid_dim :].unflatten(1, (2, 32))
    width = gains.square().sum(dim=1).mean(dim=0)[8:]  # a narrow band of one frame says little
    assert (width.log10().abs() < 0.2).all()


def test_width_and_loudness_survive_on_unseen_sounds(vae):
    for seed in (100, 101, 102, 103):
        wave = play_band(seed, 1.0)
        found = through(vae, wave)
        assert stereo_width_db(found) == pytest.approx(stereo_width_db(wave), abs=2.0)
        assert loudness_difference_lu(found, wave) == pytest.approx(0, abs=0.7)


def test_energy_gains_bring_lost_energy_back(vae, waves):
    soft = SpectralVAE(SpectralVAEConfig(**CODED)).eval()
    soft.load_state_dict(vae.state_dict())
    with torch.no_grad():
        soft.feature_mean.mul_(0.9)  # what is coded too softly
        soft.mid_basis.mul_(0.95)
        before = abs(loudness_difference_lu(through(soft, waves[0]), waves[0]))
        fit_energy_gains(soft, waves)
    after = abs(loudness_difference_lu(through(soft, waves[0]), waves[0]))
    assert after < 0.5 * before
    with pytest.raises(DataError, match="silence"):
        fit_energy_gains(soft, [torch.zeros(2, RATE)])


def test_stored_gains_come_back(vae, tmp_path):
    vae.save_pretrained(tmp_path / "vae")
    loaded = SpectralVAE.from_pretrained(tmp_path / "vae")
    assert torch.equal(loaded.feature_gain, vae.feature_gain) and not torch.all(vae.feature_gain == 1)
    assert torch.equal(through(loaded, play_band(3, 0.5)), through(vae, play_band(3, 0.5)))


@torch.no_grad()
def test_a_song_in_chunks_is_as_wide_as_in_one_pass(vae, monkeypatch):
    monkeypatch.setattr(vae, "CHUNK_FRAMES", 80)
    latents = vae.encode(play_band(8, 4.0)[None])[0]
    samples = latents.shape[1] * 960 - 123
    chunked = vae.decode_song(latents, samples)
    whole = vae.decode(latents[None], samples)[0]
    assert stereo_width_db(chunked) == pytest.approx(stereo_width_db(whole), abs=0.3)
    assert chunked.diff(n=2).abs().max() < 1.1 * whole.diff(n=2).abs().max()  # no clicks
    for side in range(2):
        chunked_level, level = (
            (vae.features.stft(w[side][None]).abs() + 0.01).log10() for w in (chunked, whole)
        )
        assert (chunked_level - level).abs().mean() < 0.05


@torch.no_grad()
def test_halfway_between_two_sounds_both_are_heard(vae):
    first, second = play_band(22, 1.0), play_band(23, 1.0)
    one, other = (vae.encode(wave[None]) for wave in (first, second))
    half = vae.decode((one + other) / 2)[0]
    assert torch.isfinite(half).all()
    low, high = sorted(float(wave.norm()) for wave in (first, second))
    assert 0.2 * low < half.norm() < 1.5 * high

    def spectrum(wave: Tensor) -> Tensor:
        level = (vae.features.stft(wave.mean(0)[None])[0, 5:256, 5:-5].abs() + 1e-2).log()
        return level - level.mean()

    mixed = spectrum(half)
    for wave in (first, second):
        level = spectrum(wave)
        assert (mixed * level).sum() / (mixed.norm() * level.norm()) > 0.3


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({"side_coding": "wide"}, "side_coding"),
        ({"side_bands": 0}, "side_bands"),
        ({"energy_gains": True}, "side_coding"),
        ({"side_coding": BANDS, "side_bands": 4, "side_latents": 9}, "side_latents"),
    ],
)
def test_wrong_settings_are_named(wrong, told):
    with pytest.raises(ConfigError, match=told):
        SpectralVAE(SpectralVAEConfig(**wrong))
