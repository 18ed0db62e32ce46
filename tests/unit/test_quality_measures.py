"""Each measure of quality falls for its own fault; what cannot be measured is not a number."""

import math

import numpy as np
import pytest
import torch

pytest.importorskip("librosa")
from duotok.recipes.evaluation import voice_metrics  # noqa: E402
from duotok.recipes.evaluation.audio_metrics import log10_mel_l1, mel_distance  # noqa: E402
from duotok.recipes.evaluation.kept_measures import Heard, KeptMeasures  # noqa: E402
from duotok.recipes.evaluation.quality_sounds import level_sounds  # noqa: E402
from duotok.recipes.evaluation.sound import stereo_width_db  # noqa: E402
from duotok.tokenizer.common.errors import DataError  # noqa: E402


def noise(seconds: float = 1.0, seed: int = 0) -> torch.Tensor:
    return 0.1 * torch.randn(2, round(48_000 * seconds), generator=torch.Generator().manual_seed(seed))


def test_the_mel_distance_is_about_four_times_a_log10_mel_l1():
    wave = noise()
    assert mel_distance(wave, wave) == 0
    tenth = mel_distance(wave, 0.1 * wave)
    # Two spectrograms, squared magnitudes: 2 x 2 x log10(10), and the magnitudes' own difference.
    assert tenth == pytest.approx(4 * log10_mel_l1(wave, 0.1 * wave), rel=0.2)
    assert tenth > 4 and mel_distance(wave, 0.5 * wave) < tenth
    assert mel_distance(wave, noise(seed=1)) > 0.3


def test_the_width_is_the_energy_of_the_side_over_the_mid():
    left, right = noise().double()
    mid, side = left + right, left - right
    expected = 10 * math.log10(float(side.square().sum() / mid.square().sum()))
    assert stereo_width_db(torch.stack([left, right])) == pytest.approx(expected)
    assert stereo_width_db(torch.stack([left, left])) == -40
    assert stereo_width_db(torch.stack([left, -left])) == 40
    assert stereo_width_db(torch.zeros(2, 100)) == -40
    assert stereo_width_db(torch.stack([left, 0 * left])) == pytest.approx(0, abs=1e-9)


def test_only_sounds_that_cannot_know_the_level_are_levelled():
    wave = noise()
    sounds = {"original": wave, "vae": 0.5 * wave, "round_trip": 0.5 * wave, "silent": 0 * wave}
    found = level_sounds(sounds)
    assert torch.equal(found["vae"], 0.5 * wave) and torch.equal(found["original"], wave)
    assert torch.allclose(found["round_trip"], wave, atol=1e-6)
    assert not found["silent"].any()


def speak(seconds: float = 3.0) -> torch.Tensor:
    """Something voiced with syllables."""
    times = np.arange(round(48_000 * seconds)) / 48_000
    tone = sum(np.sin(2 * np.pi * k * 150 * times) / k for k in range(1, 20))
    return torch.from_numpy(0.1 * tone * np.clip(np.sin(2 * np.pi * 2 * times), 0, 1)).float().repeat(2, 1)


@pytest.mark.parametrize(("package", "name", "best"), [("pesq", "pesq", 4.6), ("pystoi", "stoi", 0.999)])
def test_voice_measures_fall_with_noise(package, name, best):
    pytest.importorskip(package)
    measure = voice_metrics.find_voice_metrics()[name]
    voice = speak()
    little, much = (measure(voice, voice + gain * noise(3.0)) for gain in (0.02, 0.5))
    assert measure(voice, voice) > best > little > much > 0
    assert math.isnan(found := measure(voice, 0 * voice)) or found < much
    assert math.isnan(measure(voice[:, :1000], voice[:, :1000]))


def test_missing_packages_are_left_out(monkeypatch):
    monkeypatch.setattr(voice_metrics, "find_spec", lambda name: None)
    assert voice_metrics.find_voice_metrics() == {}


def test_measures_are_kept_under_their_conditions(tmp_path):
    heard = {
        "vae": Heard(figures={"pesq": math.nan, "mel": 0.5}, features=torch.ones(2, 200)),
        "silent": Heard(figures={"mel": 1.0}),
    }
    kept = KeptMeasures(tmp_path, {"seed": 0})
    assert kept.read("a") is None
    kept.keep("a", heard)
    found = kept.read("a")
    assert found is not None and list(found) == ["vae", "silent"]
    assert math.isnan(found["vae"].figures["pesq"]) and found["vae"].figures["mel"] == 0.5
    features = found["vae"].features
    assert features is not None and torch.equal(features, torch.ones(2, 200))
    assert found["silent"].features is None
    assert kept.read("b") is None and KeptMeasures(tmp_path, {"seed": 1}).read("a") is None
    next(tmp_path.glob("*/*.safetensors")).write_bytes(b"damaged")
    with pytest.raises(DataError, match="is damaged; delete it"):
        kept.read("a")


def test_without_a_folder_nothing_is_kept():
    kept = KeptMeasures(None, {})
    kept.keep("a", {"vae": Heard()})
    assert kept.read("a") is None
