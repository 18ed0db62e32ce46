"""The singer's tuning: found in melodies whose tuning is known; clocks and waves there and back."""

import numpy as np
import pytest
import torch

from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.music.pitch import PITCH_RATE_HZ, sung_pitch
from duotok.tokenizer.music.tuning import LEAST_CONFIDENCE, PitchClock, estimate_tuning

SCALE = np.array([57, 59, 60, 62, 64, 65, 67, 69])


def sing(cents, seconds: float = 20.0, seed: int = 0) -> torch.Tensor:
    """A melody with vibrato, slides, breaths and notes that are missed by 10 cents, cents(seconds) away."""
    rng = np.random.default_rng(seed)
    times = np.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    notes = rng.choice(SCALE, size=round(2 * seconds)) + rng.normal(scale=0.1, size=round(2 * seconds))
    pitch = np.repeat(notes, SAMPLE_RATE_HZ // 2)
    slide = np.hanning(2_401)
    pitch = np.convolve(np.pad(pitch, 1_200, mode="edge"), slide / slide.sum(), mode="valid")
    pitch += 0.3 * np.sin(2 * np.pi * 5.5 * times) + np.broadcast_to(cents(times), times.shape) / 100
    phase = 2 * np.pi * np.cumsum(440 * 2 ** ((pitch - 69) / 12)) / SAMPLE_RATE_HZ
    wave = sum(np.sin(k * phase) / k for k in range(1, 6)) * (times % 0.5 < 0.42)
    return torch.from_numpy(0.1 * wave).float()[None]


def circle(cents: float) -> float:
    """Cents on the circle of a semitone."""
    return abs((cents + 50) % 100 - 50)


@pytest.mark.parametrize("cents", range(-50, 51, 20))
def test_the_tuning_of_a_melody_is_found(cents):
    found = estimate_tuning(sung_pitch(sing(lambda _: cents)))
    assert circle(found.cents - cents) < 5
    assert found.drift_cents == 0 and found.confidence > 2 * LEAST_CONFIDENCE


@pytest.mark.parametrize("cents", range(-50, 51, 10))
def test_the_tuning_of_pitches_is_found(cents):
    pitches = np.repeat(SCALE, 25) + cents / 100
    assert circle(estimate_tuning(pitches).cents - cents) < 0.1


@pytest.mark.parametrize(("start", "end"), [(-30, 30), (30, -30), (20, 80), (-40, -160)])
def test_a_drift_is_followed_round_the_circle(start, end):
    seconds = 40
    found = estimate_tuning(sung_pitch(sing(lambda times: start + (end - start) * times / seconds, seconds)))
    wanted = start + (end - start) * (np.arange(seconds) + 0.5) / seconds
    assert abs(found.cents) <= 50
    away = found.curve - wanted
    away -= 100 * round(float(away.mean()) / 100)
    assert np.abs(away).max() < 10
    assert found.drift_cents == pytest.approx(abs(end - start), abs=10)


def test_nobody_is_tuned_who_speaks_or_is_silent():
    rng = np.random.default_rng(0)
    syllables = rng.uniform(45, 65, size=160)
    speech = (syllables[:, None] - np.linspace(0, 1.5, 12)).ravel()
    assert estimate_tuning(speech).confidence < LEAST_CONFIDENCE
    for silence in (np.zeros(0), np.full(1, 60.0), np.full(500, np.nan)):
        assert estimate_tuning(silence) is None


def test_a_pause_before_and_after_the_singing_keeps_its_tuning():
    pitches = np.full(round(60 * PITCH_RATE_HZ), np.nan)
    sung = slice(round(20 * PITCH_RATE_HZ), round(40 * PITCH_RATE_HZ))
    pitches[sung] = np.repeat(np.resize(SCALE, 40), 25) + np.linspace(-0.2, 0.2, 1000)
    curve = estimate_tuning(pitches).curve
    assert len(curve) == 60
    assert curve[:20] == pytest.approx(curve[20]) and curve[40:] == pytest.approx(curve[39])
    assert curve[[20, 39]] == pytest.approx([-20, 20], abs=3)


@pytest.mark.parametrize("cents", [-50.0, 37.0, np.linspace(-30, 30, 7)])
def test_there_and_back(cents):
    seconds = 7.3
    clock = PitchClock(cents, seconds)
    times = np.linspace(0, seconds, 100)
    assert clock.to_song(clock.to_pitched(times)) == pytest.approx(times, abs=0.1 / SAMPLE_RATE_HZ)
    samples = round(seconds * SAMPLE_RATE_HZ)
    assert samples > 200_000  # more than one block
    moments = np.arange(samples) / SAMPLE_RATE_HZ
    wave = torch.from_numpy(np.stack([np.sin(2 * np.pi * hz * moments) for hz in (300, 9_000)])).float()
    pitched = clock.bring_to_pitch(wave)
    assert pitched.shape[1] == pytest.approx(clock.to_pitched(seconds) * SAMPLE_RATE_HZ, abs=1)
    for side in range(2):  # by itself, or on both sides, as from one microphone
        both = clock.bring_to_pitch(wave[[side, side]])
        assert torch.equal(both, pitched[[side, side]])
    back = clock.bring_back(pitched, samples)
    assert back.shape == wave.shape
    assert float((back - wave)[:, 1_000:-1_000].abs().max()) < 1e-3


def test_at_pitch_a_melody_is_at_pitch():
    for cents in (-40.0, np.linspace(-30, 30, 20)):
        sung = sing(lambda times, cents=cents: np.interp(times, np.arange(20) + 0.5, np.resize(cents, 20)))
        found = estimate_tuning(sung_pitch(PitchClock(cents, 20.0).bring_to_pitch(sung)))
        assert circle(found.cents) < 5 and found.drift_cents == 0
