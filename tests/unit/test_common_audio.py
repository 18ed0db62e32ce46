import numpy as np
import pytest
import soundfile
import torch

from duotok.tokenizer.common.audio import read_audio, write_audio
from duotok.tokenizer.common.errors import AudioError


@pytest.mark.parametrize(
    ("rate", "channels", "suffix"),
    [(8_000, 1, "wav"), (44_100, 2, "flac"), (96_000, 6, "wav"), (48_000, 2, "ogg"), (44_100, 2, "mp3")],
)
def test_any_rate_and_channel_count(tmp_path, rate, channels, suffix):
    times = np.arange(rate) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * times)[:, None].repeat(channels, axis=1)
    path = tmp_path / f"tone.{suffix}"
    soundfile.write(path, wave, rate)
    result = read_audio(path)
    assert result.dtype == torch.float32 and result.shape[0] == 2
    assert abs(result.shape[1] - 48_000) <= (0 if suffix != "mp3" else 4_000)
    spectrum = torch.fft.rfft(result[0, :48_000]).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 1


def test_cut_and_round_trip(tmp_path):
    wave = torch.linspace(-0.5, 0.5, 48_000).repeat(2, 1)
    write_audio(tmp_path / "ramp.wav", wave)
    cut = read_audio(tmp_path / "ramp.wav", start_seconds=0.25, seconds=0.5)
    assert cut.shape == (2, 24_000)
    torch.testing.assert_close(cut, wave[:, 12_000:36_000], atol=1e-4, rtol=0)
    assert [path.name for path in tmp_path.iterdir()] == ["ramp.wav"]


def test_bad_files_are_one_clear_line(tmp_path):
    (tmp_path / "text.wav").write_text("not audio")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 48_000)
    soundfile.write(tmp_path / "nan.wav", np.full((100, 1), np.nan), 48_000, subtype="FLOAT")
    for name, message in [
        ("none.wav", "does not exist"),
        (".", "is a folder"),
        ("text.wav", "not readable"),
        ("empty.wav", "no samples"),
        ("nan.wav", "NaN"),
    ]:
        with pytest.raises(AudioError, match=message) as error:
            read_audio(tmp_path / name)
        assert "\n" not in str(error.value)


def test_unwritable_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AudioError, match="cannot write"):
        write_audio(tmp_path / "file" / "x.wav", torch.zeros(2, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
