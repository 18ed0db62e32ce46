"""Measures of sound: perfect for the same sound, each falls for its own fault; joints, heard or not."""

import numpy as np
import pytest
import torch

from duotok.recipes.accompany.request import GenerationSettings
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation.audio_metrics import (
    chroma_correlation,
    fine_structure,
    flux_ratios,
    hear_stems,
    level_jumps_db,
    log10_mel_l1,
    longest_silence_seconds,
    loudness_difference_lu,
    measure_peak,
    measure_playing,
    worst_loss_percent,
)
from duotok.recipes.evaluation.excerpts import Excerpt, Settings
from duotok.recipes.evaluation.renderer_part import measure_whole_song
from duotok.renderer.renderer import Renderer, plan_windows
from duotok.tokenizer.model import DuoTokenizer

PLACE = 96_123


@pytest.fixture(scope="module")
def wave() -> torch.Tensor:
    """Four seconds of a chord with a slow tremolo over some noise."""
    times = torch.arange(4 * 48_000) / 48_000
    tones = sum(torch.sin(2 * torch.pi * hertz * times) for hertz in (220, 277, 330))
    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(0))
    return (0.05 * tones * (1 + 0.2 * torch.sin(3 * times)) + 0.01 * noise).repeat(2, 1)


@pytest.mark.parametrize("offset", [-200, 0, 239, 480])
def test_a_click_is_heard_wherever_it_falls_between_frames(wave, offset):
    clicked = wave.clone()
    clicked[:, PLACE + offset] += 0.5
    assert float(flux_ratios(clicked, [PLACE + offset])) > 1.5


def test_a_gap_is_heard_and_a_step_of_level_measured_in_db(wave):
    cut, louder = wave.clone(), wave.clone()
    cut[:, PLACE - 480 : PLACE] = 0
    assert float(flux_ratios(cut, [PLACE])) > 1.3
    louder[:, PLACE:] *= 2
    assert float(level_jumps_db(louder, [PLACE])) == pytest.approx(6.0, abs=1.0)


def test_a_place_like_any_other_is_unheard_at_any_gain_and_silence_is_finite(wave):
    assert float(flux_ratios(wave, [PLACE])) == pytest.approx(1, abs=0.15)
    assert float(flux_ratios(wave).median()) == pytest.approx(1, abs=0.05)
    assert float(level_jumps_db(wave, [PLACE])) < 1
    assert torch.allclose(flux_ratios(0.1 * wave, [PLACE]), flux_ratios(wave, [PLACE]), rtol=1e-3)
    silent = torch.zeros(2, 48_000)
    assert flux_ratios(silent).isfinite().all() and float(level_jumps_db(silent, [20_000])) == 0


def test_a_song_longer_than_a_window_has_joints_where_they_are(tiny_corpus, tiny_bundle, monkeypatch):
    """A click at the joint of two windows of latents is heard in its figure and in no other."""
    items = read_manifest(tiny_corpus / "test.jsonl")
    excerpts = [Excerpt(item=item, start_seconds=0.0, seconds=2.5) for item in items]
    tokenizer = DuoTokenizer.from_pretrained(tiny_bundle / "tokenizer")
    renderer = Renderer.from_pretrained(tiny_bundle / "renderer")
    settings = Settings(corpus=tiny_corpus, bundle=tiny_bundle)

    def measure() -> dict[str, float]:
        fast = GenerationSettings(steps=1, render_guidance=1.0)
        return measure_whole_song(tokenizer, renderer, excerpts, fast, settings)

    quiet = measure()
    assert quiet["song_seconds"] == 37.5 and quiet["joints"] == 1
    assert quiet["seconds_per_second"] > 0
    decode = renderer.decode

    def decode_with_click(latents, samples, progress=None):
        wave = decode(latents, samples, progress)
        joint = plan_windows(938)[1]
        wave[:, (joint.start + joint.known) * 1920] += 30 * wave.abs().max()
        return wave

    monkeypatch.setattr(renderer, "decode", decode_with_click)
    clicked = measure()
    assert clicked["joint_flux_ratio"] > 3 * quiet["joint_flux_ratio"]
    assert clicked["chunk_joint_flux_ratio"] == pytest.approx(quiet["chunk_joint_flux_ratio"], rel=0.05)


def play(pitches: tuple[int, ...]) -> torch.Tensor:
    times = torch.arange(96_000) / 48_000
    frequencies = [440 * 2 ** ((pitch - 69) / 12) for pitch in pitches]
    tone = sum(torch.sin(2 * torch.pi * k * f * times) / k for f in frequencies for k in range(1, 9))
    noise = torch.randn(96_000, generator=torch.Generator().manual_seed(0)) * 1e-3
    return (0.05 * tone + noise).repeat(2, 1)


def test_the_same_sound_is_perfect():
    wave = play((48, 60, 64))
    assert chroma_correlation(wave, wave) == pytest.approx(1, abs=1e-4)
    assert fine_structure(wave, wave) == pytest.approx((1, 1, 1), abs=1e-4)
    assert log10_mel_l1(wave, wave) == 0


def test_other_notes_lose_chroma_and_fine_structure():
    wave, other = play((48, 60, 64)), play((49, 61, 66))
    assert chroma_correlation(wave, other) < 0.2
    assert max(fine_structure(wave, other)[1:]) < 0.5


def test_the_worst_measure_decides():
    names = (
        "chroma_correlation",
        *(f"fine_structure_{band}_hz" for band in ("50_300", "300_1000", "1000_3000")),
    )
    many = dict.fromkeys(names, 0.5) | {"log10_mel_l1": 0.2}
    assert worst_loss_percent(many, many) == 0
    assert worst_loss_percent(many | {"log10_mel_l1": 0.21, names[0]: 0.6}, many) == pytest.approx(5)
    assert worst_loss_percent(many | {"log10_mel_l1": 0.1, names[3]: 0.4}, many) == pytest.approx(20)


def test_a_tenth_of_the_level_is_one_in_log10_mel_and_keeps_chroma():
    wave = play((48, 60, 64))
    assert log10_mel_l1(wave, wave * 0.1) == pytest.approx(1, abs=0.05)
    assert chroma_correlation(wave, wave * 0.1) > 0.99


def test_channels_are_averaged_and_lengths_must_agree():
    wave = play((60,))
    assert chroma_correlation(wave, wave.mean(0, keepdim=True)) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="equally long"):
        log10_mel_l1(wave, wave[:, 1:])


def test_facts_about_a_sound():
    tone = 0.5 * torch.sin(2 * torch.pi * 1000 * torch.arange(4 * 48_000) / 48_000).repeat(2, 1)
    gap = tone.clone()
    gap[:, 48_000 : round(2.5 * 48_000)] = 0
    assert longest_silence_seconds(tone) == 0.0
    assert longest_silence_seconds(gap) == pytest.approx(1.5)
    assert measure_peak(tone) == pytest.approx(0.5, abs=1e-3)
    assert loudness_difference_lu(tone * 0.5, tone) == pytest.approx(-6.02, abs=0.02)
    assert loudness_difference_lu(torch.zeros_like(tone), tone) == -120.0


@pytest.mark.parametrize("played", ["drums", "bass", "chords", "drums bass", "bass chords", "drums chords"])
def test_stems_are_heard_in_their_bars_alone(played):
    """Eight bars of 1 s, silence in the last four, two strokes in each of the others."""
    times = torch.arange(8 * 48_000) / 48_000
    noise = torch.randn(len(times), generator=torch.Generator().manual_seed(0))
    stems = {
        "drums": 0.2 * noise * torch.exp(-((times % 0.5) * 40)),
        "bass": 0.1 * torch.sin(2 * torch.pi * 55 * times),
        "chords": 0.05 * sum(torch.sin(2 * torch.pi * hertz * times) for hertz in (262, 330, 392)),
    }
    wave = sum(stems[name] for name in played.split()) * (times < 4)
    bars = np.arange(9.0)
    heard = hear_stems(wave.repeat(2, 1), bars)
    for stem, found in heard.items():
        assert found.tolist() == [stem in played.split()] * 4 + [False] * 4, stem
    playing = measure_playing(wave.repeat(2, 1), bars / 2, bars)
    assert playing[f"bars_with_{played.split()[0]}"] == 0.5
    if "drums" in played:
        assert playing["onsets_per_beat"] == pytest.approx(1, abs=0.2)
    assert np.isnan(measure_playing(wave.repeat(2, 1), bars[:1], bars[:1])["bars_with_bass"])
