"""The measure of joints hears a click, a cut and a step of level, and nothing where there is nothing."""

import pytest
import torch

from duotok.recipes.accompany.request import GenerationSettings
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.evaluation.audio_metrics import flux_ratios, level_jumps_db
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


def test_a_place_like_any_other_has_a_ratio_of_about_one(wave):
    assert float(flux_ratios(wave, [PLACE])) == pytest.approx(1, abs=0.15)
    assert float(flux_ratios(wave).median()) == pytest.approx(1, abs=0.05)
    assert float(level_jumps_db(wave, [PLACE])) < 1


@pytest.mark.parametrize("offset", [-200, 0, 239, 480])
def test_a_click_is_heard_wherever_it_falls_between_frames(wave, offset):
    clicked = wave.clone()
    clicked[:, PLACE + offset] += 0.5
    assert float(flux_ratios(clicked, [PLACE + offset])) > 1.5


def test_a_gap_is_heard(wave):
    cut = wave.clone()
    cut[:, PLACE - 480 : PLACE] = 0
    assert float(flux_ratios(cut, [PLACE])) > 1.3


def test_a_step_of_level_is_measured_in_db(wave):
    louder = wave.clone()
    louder[:, PLACE:] *= 2
    assert float(level_jumps_db(louder, [PLACE])) == pytest.approx(6.0, abs=1.0)


def test_gain_changes_nothing_and_silence_is_finite(wave):
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
