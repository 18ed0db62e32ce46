"""The measures of rebuilt sound: perfect for the same sound, and each falls for its own fault."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("librosa")
from duotok.recipes.evaluation.audio_metrics import chroma_correlation, fine_structure, log10_mel_l1


def play(pitches: tuple[int, ...]) -> Tensor:
    times = torch.arange(96_000) / 48_000
    frequencies = [440 * 2 ** ((pitch - 69) / 12) for pitch in pitches]
    tone = torch.stack(
        [torch.sin(2 * torch.pi * k * f * times) / k for f in frequencies for k in range(1, 9)]
    ).sum(0)
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


def test_a_tenth_of_the_level_is_one_in_log10_mel_and_keeps_chroma():
    wave = play((48, 60, 64))
    assert log10_mel_l1(wave, wave * 0.1) == pytest.approx(1, abs=0.05)
    assert chroma_correlation(wave, wave * 0.1) > 0.99


def test_channels_are_averaged_and_lengths_must_agree():
    wave = play((60,))
    assert chroma_correlation(wave, wave.mean(0, keepdim=True)) == pytest.approx(1, abs=1e-4)
    with pytest.raises(ValueError, match="equally long"):
        log10_mel_l1(wave, wave[:, 1:])
