import pytest
import soundfile
import torch

from duotok.recipes.accompany.mix import load_prefix, load_vocal
from duotok.tokenizer.common.errors import AudioError


def wave(samples: int = 96_000, channels: int = 2) -> torch.Tensor:
    return 0.1 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(0))


def test_files_and_tensors_give_the_same_vocal(tmp_path):
    soundfile.write(tmp_path / "a.wav", wave().numpy().T, 48_000, subtype="FLOAT")
    assert torch.equal(load_vocal(tmp_path / "a.wav").wave, load_vocal(wave()).wave)


def test_mono_and_many_channels_become_stereo():
    assert load_vocal(wave()[0]).wave.shape == (2, 96_000)
    assert load_vocal(wave(channels=6)).wave.shape == (2, 96_000)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (wave(47_999), "at least 1 s"),
        (torch.zeros(2, 96_000), "silent"),
        (torch.where(torch.arange(96_000) == 50_000, torch.nan, wave()), "NaN"),  # one is enough
        (torch.full((2, 96_000), torch.inf), "NaN or infinite"),
        (torch.zeros(2, 3, 96_000), "shape"),
        (wave().T, "shape"),
    ],
)
def test_unusable_vocals_are_refused(bad, message):
    with pytest.raises(AudioError, match=message):
        load_vocal(bad)


def test_a_vocal_above_full_scale_is_turned_down():
    vocal = load_vocal(wave() * 1e5)
    assert float(vocal.wave.abs().max()) == pytest.approx(1.0)
    assert "full scale" in vocal.warnings[0]


def test_a_quiet_vocal_gets_a_warning():
    assert "quiet" in load_vocal(wave() * 1e-2).warnings[0]
    assert load_vocal(wave()).warnings == ()


def test_a_vocal_whose_sides_cancel_is_heard():
    left = wave(channels=1)
    vocal = load_vocal(torch.cat([left, -left]))
    assert torch.equal(vocal.listened, left[None])
    assert torch.equal(load_vocal(wave()).listened, wave()[None])


@pytest.mark.parametrize("samples", [96_000, 200_000])
def test_a_prefix_must_be_shorter_than_the_song(samples):
    with pytest.raises(AudioError, match="shorter than the song"):
        load_prefix(wave(samples), load_vocal(wave()))
    assert load_prefix(wave(48_000), load_vocal(wave())).shape == (1, 2, 48_000)
