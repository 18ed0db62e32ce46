import os

import numpy as np
import pytest
import soundfile
import torch

from duotok.tokenizer.common.audio import (
    audio_seconds,
    read_audio,
    resample,
    resample_blocks,
    stream_audio,
    write_audio,
)
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


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9.wav"), "wave.raw", "no ending"])
def test_what_a_file_is_called_plays_no_part(tmp_path, name):
    wave = torch.linspace(-0.5, 0.5, 4_800).repeat(2, 1)
    write_audio(tmp_path / name, wave)
    torch.testing.assert_close(read_audio(tmp_path / name), wave, atol=1e-4, rtol=0)
    assert audio_seconds(tmp_path / name) == 0.1
    with pytest.raises(AudioError, match=r"cannot write .*caf\\xe9.wav: "):
        write_audio(tmp_path / name / os.fsdecode(b"caf\xe9.wav"), wave)


def test_bad_files_are_one_clear_line(tmp_path):
    tone = np.zeros((4_000, 1))
    (tmp_path / "text.wav").write_text("not audio")
    (tmp_path / "nothing.wav").write_bytes(b"")
    os.mkfifo(tmp_path / "pipe.wav")
    soundfile.write(tmp_path / "empty.wav", np.zeros((0, 1)), 48_000)
    soundfile.write(tmp_path / "nan.wav", np.full((100, 1), np.nan), 48_000, subtype="FLOAT")
    for rate in (1, 68, 3_999, 768_001, 2_000_000_000):
        soundfile.write(tmp_path / f"{rate}.wav", tone, rate)
    # A FLAC's count of samples: 36 bits from the middle of byte 21 on.
    soundfile.write(tmp_path / "vast.flac", tone, 48_000)
    data = bytearray((tmp_path / "vast.flac").read_bytes())
    data[21] |= 0x0F
    (tmp_path / "vast.flac").write_bytes(data)
    for name, message in [
        ("none.wav", "does not exist"),
        (".", "is a folder"),
        ("pipe.wav", "is a named pipe"),
        ("/dev/zero", "is a device"),
        ("text.wav", "not readable"),
        ("nothing.wav", "empty file"),
        ("empty.wav", "no samples"),
        ("nan.wav", "NaN"),
        ("1.wav", "1 samples a second; give a recording of 4000 to 768000"),
        ("68.wav", "68 samples a second"),
        ("3999.wav", "3999 samples a second"),
        ("768001.wav", "768001 samples a second"),
        ("2000000000.wav", "2000000000 samples a second"),
        ("vast.flac", r"64424513440 samples, which \d+ bytes cannot hold"),
    ]:
        for read in (read_audio, audio_seconds, lambda path: list(stream_audio(path, 1_000))):
            if read is audio_seconds and name in ("empty.wav", "nan.wav"):
                continue
            with pytest.raises(AudioError, match=message) as error:
                read(tmp_path / name)
            assert str(error.value).isprintable()


@pytest.mark.parametrize("rate", [4_000, 768_000])
def test_the_outermost_rates_are_read(tmp_path, rate):
    soundfile.write(tmp_path / "tone.wav", 0.1 * np.ones((rate // 10, 1)), rate)
    assert read_audio(tmp_path / "tone.wav").shape == (2, 4_800)


def test_resampling_block_by_block_is_that_of_one_pass():
    wave = torch.randn(2, 50_001, generator=torch.Generator().manual_seed(0))
    for from_hz, to_hz in ((44_100, 48_000), (96_000, 48_000), (48_000, 16_000), (48_000, 48_000)):
        whole = resample(wave, from_hz, to_hz)
        assert whole.shape == (2, round(50_001 * to_hz / from_hz))
        parts = resample_blocks((part.numpy().T for part in wave.split(7_001, dim=1)), from_hz, to_hz)
        assert torch.equal(torch.from_numpy(np.concatenate(list(parts)).T), whole)
    longer = resample(wave[None], 48_000, 48_000, 50_003)
    assert longer.shape == (1, 2, 50_003) and torch.equal(longer[0, :, :-2], wave)


def test_unwritable_folder_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(AudioError, match="cannot write"):
        write_audio(tmp_path / "file" / "x.wav", torch.zeros(2, 10))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
