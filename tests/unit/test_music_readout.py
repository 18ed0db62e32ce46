import numpy as np
import pytest
import torch

from duotok.recipes.music.chords import estimate_chords
from duotok.recipes.music.chroma import correlate_chroma, measure_chroma
from duotok.recipes.music.coherence import Coherence, measure_coherence
from duotok.recipes.music.key import Key, estimate_key
from duotok.recipes.music.pitch import PITCH_RATE_HZ, sung_pitch
from duotok.recipes.music.tempo import estimate_tempo, onset_envelope, track_beats
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.spectra import Chroma

TRIADS = {"maj": (0, 4, 7), "min": (0, 3, 7)}


def tone(frequency_hz: float, seconds: float) -> torch.Tensor:
    times = torch.arange(round(seconds * SAMPLE_RATE_HZ)) / SAMPLE_RATE_HZ
    wave = sum(torch.sin(2 * torch.pi * k * frequency_hz * times) / k for k in range(1, 6))
    return (0.1 * wave)[None].repeat(2, 1)


def triad(root: int, mode: str) -> np.ndarray:
    chroma = np.full(12, 0.1)
    chroma[[(root + step) % 12 for step in TRIADS[mode]]] = 1.0
    return chroma


@pytest.mark.parametrize(
    ("tonic", "mode", "name"), [(0, "maj", "C:maj"), (9, "min", "A:min"), (6, "maj", "F#:maj")]
)
def test_key_of_its_own_scale_and_tonic_triad(tonic, mode, name):
    key = Key(tonic=tonic, mode=mode)
    chroma = np.array([float(pitch in key.scale) for pitch in range(12)]) + triad(tonic, mode)
    assert str(estimate_key(chroma)) == name


def test_no_key_without_pitch():
    assert estimate_key(np.ones((10, 12))) is None
    assert estimate_key(np.zeros((10, 12))) is None


def test_chords_follow_the_changes():
    rng = np.random.default_rng(0)
    wanted = [(0, "maj"), (9, "min"), (5, "maj"), (7, "maj")]
    chroma = np.concatenate([np.tile(triad(*chord), (100, 1)) for chord in wanted])
    chroma = np.clip(chroma + rng.normal(scale=0.25, size=chroma.shape), 0, None)
    chords = estimate_chords(chroma, 50.0)
    assert [name for _, _, name in chords] == ["C:maj", "A:min", "F:maj", "G:maj"]
    assert [start for start, _, _ in chords] == pytest.approx([0, 2, 4, 6], abs=0.2)
    assert chords[-1][1] == 8.0


def test_chords_cover_everything_and_silence_has_none():
    assert estimate_chords(np.zeros((123, 12)), 50.0) == [(0.0, 2.46, "N")]
    assert estimate_chords(np.zeros((0, 12)), 50.0) == []


@pytest.mark.parametrize("tempo_bpm", [72.0, 96.5, 120.0, 141.0])
def test_tempo_and_beats_of_a_drum_pattern(tempo_bpm):
    rng = np.random.default_rng(1)
    beats = np.arange(0.3, 20.0, 60 / tempo_bpm)
    wave = np.zeros(20 * SAMPLE_RATE_HZ)
    for offset, level in ((0.0, 1.0), (30 / tempo_bpm, 0.2)):
        for beat in beats + offset:
            start = round(beat * SAMPLE_RATE_HZ)
            hit = rng.normal(size=3000) * np.exp(-np.arange(3000) / 500) * level
            wave[start : start + 3000] += hit[: len(wave[start : start + 3000])]
    envelope = onset_envelope(torch.from_numpy(0.2 * wave).float()[None])
    tempo = estimate_tempo(envelope)
    assert tempo == pytest.approx(tempo_bpm, rel=0.01)
    found = track_beats(envelope, tempo)
    near = [np.abs(found - beat).min() < 0.04 for beat in beats[1:-1]]
    assert np.mean(near) > 0.95
    assert len(found) < len(beats) + 3


def test_silence_has_no_tempo():
    assert estimate_tempo(onset_envelope(torch.zeros(2, 4 * SAMPLE_RATE_HZ))) is None


@pytest.mark.parametrize("pitch", [40, 57, 69, 80])
def test_sung_pitch(pitch):
    found = sung_pitch(tone(440 * 2 ** ((pitch - 69) / 12), 1.5))
    assert len(found) == 1.5 * PITCH_RATE_HZ
    assert np.isfinite(found).mean() > 0.9
    assert np.nanmax(np.abs(found[3:-5] - pitch)) < 0.3


def test_noise_and_silence_are_not_sung():
    noise = 0.1 * torch.randn(2, SAMPLE_RATE_HZ, generator=torch.Generator().manual_seed(0))
    assert np.isfinite(sung_pitch(noise)).mean() < 0.05
    assert np.isnan(sung_pitch(torch.zeros(2, SAMPLE_RATE_HZ))).all()


def test_chroma_in_chunks_is_the_chroma_of_one_pass():
    wave = 0.1 * torch.randn(2, 12 * SAMPLE_RATE_HZ + 100, generator=torch.Generator().manual_seed(0))
    padded = torch.nn.functional.pad(wave.mean(dim=0), (0, -wave.shape[1] % 960))[None]
    assert np.allclose(measure_chroma(wave), Chroma()(padded)[0].numpy(), atol=1e-5)


def test_coherence_tells_the_right_key_from_a_wrong_one():
    pitches = np.tile([60.0, 64.0, 67.0, np.nan, 65.0], 40)
    right = np.tile(triad(0, "maj") + 0.5 * triad(5, "maj"), (200, 1))
    good, bad = measure_coherence(right, pitches), measure_coherence(np.roll(right, 6, axis=1), pitches)
    assert good.in_key == 1.0
    assert good.harmony > 1.5 > bad.harmony
    assert good.score > bad.score + 0.5


def test_coherence_without_singing():
    assert measure_coherence(np.ones((50, 12)), np.full(50, np.nan)) == Coherence(harmony=None, in_key=None)
    assert Coherence(harmony=None, in_key=None).score == 0.0


def test_chroma_correlation():
    chroma = np.random.default_rng(0).uniform(size=(50, 12))
    assert correlate_chroma(chroma, 2 * chroma + 1) == pytest.approx(1.0)
    assert correlate_chroma(chroma, np.ones((50, 12))) is None
