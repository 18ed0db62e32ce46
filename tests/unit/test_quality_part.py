"""Quality: each measure falls for its own fault; one command makes figures, table and picture."""

import math

import numpy as np
import pytest
import torch

from duotok.recipes.evaluation import audio_metrics
from duotok.recipes.evaluation.audio_metrics import log10_mel_l1, mel_distance, stereo_width_db
from duotok.recipes.evaluation.excerpts import Settings
from duotok.recipes.evaluation.quality_part import judge_quality, level_sounds
from duotok.recipes.evaluation.quality_report import SOUNDS, draw_quality, render_quality
from duotok.tokenizer.common.errors import ConfigError

SPECTRAL = ("chroma_correlation", "fine_structure_50_300_hz", "log10_mel_l1", "mel_distance")
OTHERS = ("stereo_width_error_db", "level_error_lu", "frechet", "frechet_all")
SETS = ("frechet_standardized", "spread", "onsets_per_beat", "bars_with_drums", "bars_with_bass")
HEARD = set(SOUNDS) - {"original", "other_style"}  # all items of this corpus are of one style


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
    measure = audio_metrics.find_voice_metrics()[name]
    voice = speak()
    little, much = (measure(voice, voice + gain * noise(3.0)) for gain in (0.02, 0.5))
    assert measure(voice, voice) > best > little > much > 0
    assert math.isnan(found := measure(voice, 0 * voice)) or found < much
    assert math.isnan(measure(voice[:, :1000], voice[:, :1000]))


def test_visqol_is_what_its_authors_give_for_the_same_sound_and_falls_with_noise(monkeypatch):
    pytest.importorskip("visqol")
    voice = speak(2.0)
    found = [audio_metrics.measure_visqol(voice, voice + gain * noise(2.0)) for gain in (0.0, 0.3)]
    assert found[0] == pytest.approx(4.7321, abs=1e-3) and found[1] < 4
    monkeypatch.setattr(audio_metrics, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="pip install visqol-python"):
        audio_metrics.require_visqol()


def test_missing_packages_are_told_and_left_out(monkeypatch):
    monkeypatch.setattr(audio_metrics, "find_spec", lambda name: None)
    assert audio_metrics.find_voice_metrics() == {}
    assert audio_metrics.missing_voice_metrics() == {"pesq": "pesq", "stoi": "pystoi"}


@pytest.fixture(scope="module")
def quality(tiny_corpus, tiny_bundle):
    return judge_quality(Settings(corpus=tiny_corpus, bundle=tiny_bundle, items=2, seconds=4.0))


def test_every_sound_has_every_measure(quality):
    figures = quality.figures()
    found = set(figures)
    assert all(math.isfinite(value) for value in figures.values())
    for measure in (*SPECTRAL, *OTHERS, *SETS):
        for sound in HEARD:
            # As a set, the other songs are the same songs.
            expected = not (sound == "shuffled" and measure == "frechet_all")
            assert (f"accompaniment_{sound}_{measure}" in found) == expected, (sound, measure)
        assert (f"vocal_vae_{measure}" in found) == (measure not in SETS)
    distances = {name for name in found if name.startswith("kernel_distance_")}
    assert distances == {f"kernel_distance_{sound}" for sound in HEARD}
    # The other songs' bands are the corpus' own; noise is nothing like them.
    assert figures["kernel_distance_random"] > figures["kernel_distance_shuffled"]
    assert "vocal_round_trip_mel_distance" not in found  # this bundle has no decoder of it
    assert figures["accompaniment_silent_spread"] == 0
    assert (
        figures["accompaniment_original_bars_with_drums"] == 1
        and figures["accompaniment_generated_entropy"] > 0
    )
    assert (
        figures["accompaniment_silent_bars_with_drums"]
        == figures["accompaniment_silent_onsets_per_beat"]
        == 0
    )
    assert figures["excerpts"] == 2 and figures["excerpt_seconds"] == 4


def test_the_references_span_the_scale(quality):
    sounds = {
        sound: {name: value.mean for name, value in found.items()}
        for sound, found in quality.values["accompaniment"].items()
    }
    perfect = sounds["original"]
    assert perfect["chroma_correlation"] > 0.99 and perfect["log10_mel_l1"] == 0
    assert [perfect[name] for name in OTHERS] == pytest.approx([0, 0, 0, 0], abs=1e-6)
    for measure in ("log10_mel_l1", "mel_distance", "level_error_lu"):
        assert sounds["silent"][measure] > sounds["shuffled"][measure] > 0
    for sound in ("shuffled", "random", "silent"):
        assert sounds[sound]["chroma_correlation"] < 0.9
    assert all(sounds[sound]["frechet"] > 0 for sound in ("shuffled", "random", "silent"))
    assert quality.values["accompaniment"]["shuffled"]["mel_distance"].margin > 0


def test_table_and_picture_are_written(quality, tmp_path):
    draw_quality(quality, tmp_path / "quality.png")
    table = render_quality(quality)
    for name in HEARD:
        assert f"| {SOUNDS[name]} |" in table
    assert "## Accompaniment" in table and "## Vocal" in table
    assert f"{quality.figures()['accompaniment_vae_mel_distance']:.2f}" in table
    assert "| *paper, round trip* |" in table and "| 1.14 |" in table
    assert "round trip of the vocal: this bundle has no decoder of it" in table
    assert "there must be two styles" in table
    assert (tmp_path / "quality.png").stat().st_size > 30_000
