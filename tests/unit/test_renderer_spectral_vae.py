"""The spectral VAE: its linear coding, what survives of pitch, place, width and level, smoothness, errors."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from duotok.recipes.accompany.bundle import default_bundle
from duotok.recipes.evaluation.audio_metrics import compare_spectra, loudness_difference_lu, stereo_width_db
from duotok.recipes.renderer.train_spectral_vae import fit_energy_gains, fit_linear
from duotok.renderer.spectral_vae import SpectralVAE, SpectralVAEConfig
from duotok.renderer.spectrum import StereoFeatures, Stft, advance_phases, band_filters, griffin_lim
from duotok.tokenizer.common.audio import read_audio
from duotok.tokenizer.common.errors import CheckpointError, ConfigError, DataError

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
def stereo_vae(waves) -> SpectralVAE:
    torch.manual_seed(0)
    model = SpectralVAE(SpectralVAEConfig(**SMALL, mid_latents=56, side_latents=8))
    fit_linear(model, waves)
    fit_energy_gains(model, waves)
    return model.eval()


@torch.no_grad()
def through(vae: SpectralVAE, wave: Tensor) -> Tensor:
    return vae.decode(vae.encode(wave[None]), wave.shape[1])[0]


def level(wave: Tensor) -> Tensor:
    """Root mean square."""
    return wave.square().mean().sqrt()


def log_spectrum(wave: Tensor) -> Tensor:
    return (Stft(4096, 960)(wave[None])[0].abs() + 1e-2).log10()


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
@torch.no_grad()
def test_a_sound_stays_on_its_side(vae, side):
    wave = play_chords(7, 2.0).mean(dim=0)
    stereo = torch.stack([wave, 0.2 * wave] if side == 0 else [0.2 * wave, wave])
    found = vae.decode(vae.encode(stereo[None]), stereo.shape[1])[0]
    assert level(found[side]) > 1.15 * level(found[1 - side])


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


@torch.no_grad()
def test_a_stretch_meets_the_sound_on_both_sides(vae):
    wave = play_chords(5, 3.0)[:, : 140 * 960]
    latents = vae.encode(wave[None])[0]
    before, after = wave[:, : 40 * 960], wave[:, 100 * 960 :]
    found = vae.decode_between(latents, before, after)
    nothing = wave[:, :0]
    alone, half = vae.decode(latents[None])[0], vae.decode_between(latents, before, nothing)

    def miss(given: Tensor, start: int, stop: int) -> float:
        part = slice(start * 960, stop * 960)
        return float((given - wave)[:, part].norm() / wave[:, part].norm())

    assert found.shape == wave.shape and torch.equal(found[:, : 38 * 960], wave[:, : 38 * 960])
    assert miss(found, 38, 42) < 0.5 * miss(alone, 38, 42)  # waves, not only spectra
    assert miss(found, 100, 136) < 0.5 * min(miss(alone, 100, 136), miss(half, 100, 136))
    assert torch.allclose(vae.decode_between(latents, nothing, nothing), alone)


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
    features = StereoFeatures(fft_size=4096, hop_samples=960, low_bins=700, group=4, power=0.2, bands=32)
    tone = torch.sin(torch.arange(RATE) * (2 * np.pi * 440 / RATE)) * 0.1
    gains = features(torch.stack([left * tone, right * tone])[None])[0, 20, features.mid_dim :].unflatten(
        0, (2, 32)
    )
    band = int(features.band_filters[round(440 * 4096 / RATE)].argmax())
    assert gains[0, band].item() == pytest.approx(with_mid, abs=0.01)
    assert gains[1, band].item() == pytest.approx(beside, abs=0.05)


def test_unrelated_channels_are_as_wide_as_high(stereo_vae):
    noise = torch.randn(1, 2, RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    gains = stereo_vae.features(noise)[0, 5:-5, stereo_vae.features.mid_dim :].unflatten(1, (2, 32))
    width = gains.square().sum(dim=1).mean(dim=0)[8:]  # a narrow band of one frame says little
    assert (width.log10().abs() < 0.2).all()


def test_width_and_loudness_survive_on_unseen_sounds(stereo_vae):
    for seed in (100, 101, 102, 103):
        wave = play_band(seed, 1.0)
        found = through(stereo_vae, wave)
        assert stereo_width_db(found) == pytest.approx(stereo_width_db(wave), abs=2.0)
        assert loudness_difference_lu(found, wave) == pytest.approx(0, abs=0.7)


def test_energy_gains_bring_lost_energy_back(stereo_vae, waves):
    soft = SpectralVAE(stereo_vae.config).eval()
    soft.load_state_dict(stereo_vae.state_dict())
    with torch.no_grad():
        soft.feature_mean.mul_(0.9)  # what is coded too softly
        soft.mid_basis.mul_(0.95)
        before = abs(loudness_difference_lu(through(soft, waves[0]), waves[0]))
        fit_energy_gains(soft, waves)
    after = abs(loudness_difference_lu(through(soft, waves[0]), waves[0]))
    assert after < 0.5 * before
    with pytest.raises(DataError, match="silence"):
        fit_energy_gains(soft, [torch.zeros(2, RATE)])


def test_store_and_load(stereo_vae, tmp_path):
    wave = play_band(6, 0.5)
    for name, half, most in (("vae", False, 0.0), ("half", True, 0.1)):
        stereo_vae.save_pretrained(tmp_path / name, half=half)
        loaded = SpectralVAE.from_pretrained(tmp_path / name)
        assert loaded.fingerprint == stereo_vae.fingerprint and loaded.config == stereo_vae.config
        with torch.no_grad():
            assert (loaded.encode(wave[None]) - stereo_vae.encode(wave[None])).abs().max() <= most
        if not half:
            assert torch.equal(through(loaded, wave), through(stereo_vae, wave))
            assert not torch.all(loaded.feature_gain == 1)
    with pytest.raises(CheckpointError):
        SpectralVAE.from_pretrained(tmp_path)


@torch.no_grad()
def test_a_song_in_chunks_sounds_like_one_pass_without_clicks(stereo_vae, monkeypatch):
    monkeypatch.setattr(stereo_vae, "CHUNK_FRAMES", 80)
    latents = stereo_vae.encode(play_band(8, 4.0)[None])[0]
    samples, counts = latents.shape[1] * 960 - 123, []
    chunked = stereo_vae.decode_song(latents, samples, counts.append)
    whole = stereo_vae.decode(latents[None], samples)[0]
    assert chunked.shape == (2, samples) and sum(counts) == latents.shape[1] and len(counts) > 2
    assert stereo_width_db(chunked) == pytest.approx(stereo_width_db(whole), abs=0.3)
    assert chunked.diff(n=2).abs().max() < 1.1 * whole.diff(n=2).abs().max()
    for one, other in zip(chunked, whole, strict=True):
        assert (log_spectrum(one) - log_spectrum(other)).abs().mean() < 0.05
    # Level of every 20 ms, where there is sound: no dip where chunks meet.
    found, wanted = (w[:, : samples // 960 * 960].unflatten(1, (-1, 960)).square() for w in (chunked, whole))
    found, wanted = found.mean(dim=(0, 2)), wanted.mean(dim=(0, 2))
    audible = wanted > 0.01 * wanted.mean()
    assert (found / wanted)[audible].log10().abs().max() < 0.3  # 3 dB


@torch.no_grad()
def test_halfway_between_two_sounds_both_are_heard(stereo_vae):
    first, second = play_band(22, 1.0), play_band(23, 1.0)
    one, other = (stereo_vae.encode(wave[None]) for wave in (first, second))
    half = stereo_vae.decode((one + other) / 2)[0]
    assert torch.isfinite(half).all()
    low, high = sorted(float(wave.norm()) for wave in (first, second))
    assert 0.2 * low < half.norm() < 1.5 * high

    def spectrum(wave: Tensor) -> Tensor:
        level = (stereo_vae.features.stft(wave.mean(0)[None])[0, 5:256, 5:-5].abs() + 1e-2).log()
        return level - level.mean()

    mixed = spectrum(half)
    for wave in (first, second):
        level = spectrum(wave)
        assert (mixed * level).sum() / (mixed.norm() * level.norm()) > 0.3


VOCAL = Path(__file__).parents[2] / "examples" / "vocal.wav"
EDGE = 8  # frames at each end that the padding of the analysis reaches


@torch.no_grad()
def test_latents_of_the_shipped_autoencoder_move_smoothly_in_time():
    """What lies between two frames can be foreseen."""
    vae = SpectralVAE.from_pretrained(default_bundle() / "renderer" / "vae")
    wave = read_audio(VOCAL)[:, 2 * RATE : 6 * RATE]
    latents = vae.encode(wave[None])[0]
    frames = latents.shape[1]
    delayed = vae.encode(functional.pad(wave, (3 * vae.hop_samples, 0))[None])[0]
    inside = slice(EDGE, frames - EDGE)
    assert torch.allclose(delayed[:, 3:][:, inside], latents[:, inside], atol=1e-4)
    # A delay of half a frame lands between the neighbours.
    delayed = vae.encode(functional.pad(wave, (vae.hop_samples // 2, 0))[None])[0][:, 1:frames]
    between = (latents[:, :-1] + latents[:, 1:]) / 2
    assert (delayed - between)[:, EDGE:-EDGE].square().mean() < 0.2 * latents.var(dim=1).mean()
    # Every second frame can be interpolated.
    halved, count = latents.clone(), (frames - 1) // 2
    halved[:, 1 : 2 * count : 2] = (latents[:, 0 : 2 * count : 2] + latents[:, 2 : 2 * count + 1 : 2]) / 2
    whole, sparse = (
        compare_spectra(wave, vae.decode(each[None], wave.shape[1])[0]) for each in (latents, halved)
    )
    assert sparse["chroma_correlation"] > whole["chroma_correlation"] - 0.05
    assert sparse["fine_structure_300_1000_hz"] > whole["fine_structure_300_1000_hz"] - 0.1
    assert sparse["log10_mel_l1"] < whole["log10_mel_l1"] + 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [("power", 0.0), ("kernel_frames", 4), ("hop_samples", 2048), ("low_bins", 2048), ("mid_latents", 0)]
    + [("decoder_blocks", -1), ("side_bands", 0), ("side_latents", 65)],
)
def test_wrong_settings_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        SpectralVAE(SpectralVAEConfig(**{name: value}))


def test_wrong_shapes_are_refused(vae):
    for shape in ((2, 960), (1, 1, 960), (1, 2, 0)):
        with pytest.raises(ConfigError, match=r"\[batch, 2, samples\]"):
            vae.encode(torch.zeros(shape))
    with pytest.raises(ConfigError, match="latents"):
        vae.decode(torch.zeros(1, 63, 10))
    with pytest.raises(ConfigError, match="samples"):
        vae.decode(torch.zeros(1, 64, 10), 9601)
    with pytest.raises(ConfigError, match="samples"):
        vae.decode_song(torch.zeros(64, 10), 0)
