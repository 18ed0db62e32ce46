import pytest
import soundfile
import torch

from duotok.recipes.accompany.mix import load_prefix, load_vocal
from duotok.recipes.evaluation.fuzz import make_recording
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


_LEFT = wave(channels=1)
_SIDES = (_LEFT, 0.5 * _LEFT)


@pytest.mark.parametrize(
    ("given", "expected", "told"),
    [
        (wave(), wave(), None),
        (wave() + torch.tensor([[0.05], [-0.2]]), wave(), "the vocal had an offset of 0.2 of full scale"),
        (torch.cat([_LEFT, -0.5 * _LEFT]), torch.cat(_SIDES), "the right one was turned over"),
        (torch.cat([_LEFT, 1e-4 * wave()[1:]]), _LEFT.repeat(2, 1), "one side of the vocal is silent"),
        (torch.cat([torch.zeros_like(_LEFT), _LEFT]), _LEFT.repeat(2, 1), "one side of the vocal is silent"),
        (
            wave() * 10**-3.5 / wave().abs().max(),
            wave() * 0.25 / wave().abs().max(),
            "of -70 dBFS; it was raised by 58",
        ),
    ],
)
def test_faults_of_recordings_are_mended_and_told(given, expected, told):
    vocal = load_vocal(given)
    torch.testing.assert_close(vocal.wave, expected, atol=1e-3, rtol=0)
    assert len(vocal.warnings) == (told is not None) and all(told in line for line in vocal.warnings)
    assert torch.equal(vocal.listened, vocal.wave[None])


def test_an_offset_alone_is_silence():
    with pytest.raises(AudioError, match="silent"):
        load_vocal(torch.full((2, 96_000), 0.3))


def test_a_minute_of_silence_first_is_kept():
    late = torch.cat([torch.zeros(2, 60 * 48_000), wave()], dim=1)
    assert torch.equal(load_vocal(late).wave, late) and load_vocal(late).warnings == ()


def test_takes_are_added_up_each_mended_by_itself(tmp_path):
    make_recording(tmp_path / "lead.wav", wave(48_000).numpy(), 48_000)
    harmony = torch.cat([_LEFT, -_LEFT])
    vocal = load_vocal([tmp_path / "lead.wav", harmony, torch.zeros(2, 9)])
    expected = _LEFT.repeat(2, 1)
    expected[:, :48_000] += wave(48_000)
    torch.testing.assert_close(vocal.wave, expected, atol=1e-4, rtol=0)
    assert vocal.name == "lead.wav" and len(vocal.warnings) == 2 and "silent" in vocal.warnings[1]
    assert torch.equal(harmony, torch.cat([_LEFT, -_LEFT]))


@pytest.mark.parametrize("samples", [96_000, 200_000])
def test_a_prefix_must_be_shorter_than_the_song(samples):
    with pytest.raises(AudioError, match="shorter than the song"):
        load_prefix(wave(samples), load_vocal(wave()))
    assert load_prefix(wave(48_000), load_vocal(wave())).shape == (1, 2, 48_000)
