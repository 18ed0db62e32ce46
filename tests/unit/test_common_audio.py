import os
import re

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.evaluation.fuzz import make_recording
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
    [
        *((8_000, 1, "wav"), (44_100, 2, "flac"), (96_000, 6, "wav"), (48_000, 2, "ogg"), (44_100, 2, "mp3")),
        *(
            (44_100, 1, "m4a"),
            (44_100, 2, "mov"),
            (48_000, 1, "webm"),
            (44_100, 2, "wma"),
            (22_050, 1, "aac"),
        ),
    ],
)
def test_any_rate_and_channel_count(tmp_path, rate, channels, suffix):
    times = np.arange(rate) / rate
    make_recording(
        tmp_path / f"a.{suffix}", 0.3 * np.sin(2 * np.pi * 440 * times)[None].repeat(channels, 0), rate
    )
    path = (tmp_path / f"a.{suffix}").rename(tmp_path / os.fsdecode(b"caf\xe9"))  # no ending, no UTF-8
    told: list[str] = []
    result = read_audio(path, tell=told.append)
    assert result.dtype == torch.float32 and result.shape[0] == 2 and not told
    assert abs(result.shape[1] - 48_000) <= (4_000 if suffix in ("mp3", "aac", "wma") else 0)
    assert audio_seconds(path) == pytest.approx(result.shape[1] / 48_000, abs=1e-4)
    spectrum = torch.fft.rfft(result[0], 48_000).abs()
    assert abs(int(spectrum.argmax()) - 440) <= 1
    assert 0.2 < float(result[:, 12_000:36_000].abs().max()) < 0.4


def _record(path, rate=48_000, **options):
    make_recording(path, 0.1 * np.random.default_rng(0).standard_normal((2, 2 * rate)), rate, **options)
    return path.read_bytes()


@pytest.mark.parametrize("suffix", ["wav", "aiff", "flac", "mp3", "m4a", "webm", "wma"])
def test_of_half_a_file_what_is_there_is_read(tmp_path, suffix):
    path = tmp_path / f"half.{suffix}"
    data = _record(path, **({"movflags": "faststart"} if suffix == "m4a" else {}))
    path.write_bytes(data[: len(data) // 2])
    told: list[str] = []
    seconds = read_audio(path, tell=told.append).shape[1] / 48_000
    assert seconds == pytest.approx(1.0, abs=0.2)
    assert len(told) == 1 and re.search(rf"half.{suffix} ends at {seconds:.1f} of 2\.[01] s$", told[0])
    if suffix == "flac":  # who takes no note of it is not given half of a song
        with pytest.raises(AudioError):
            read_audio(path)


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF, 2 * 4 * 96_000])
def test_a_size_that_was_never_or_wrongly_written(tmp_path, size):
    data = _record(path := tmp_path / "a.wav")
    at = data.index(b"data") + 4
    path.write_bytes(data[:at] + size.to_bytes(4, "little") + data[at + 4 :])
    told: list[str] = []
    assert read_audio(path, tell=told.append).shape == (2, 96_000)
    assert [line.rpartition("a.wav ")[2] for line in told] == (
        ["ends at 2.0 of 4.0 s"] if 0 < size < 2**31 else []
    )


def test_an_mp3_without_its_length(tmp_path):
    data = _record(path := tmp_path / "a.mp3", 44_100)
    path.write_bytes(data[data.index(data[:2], 100) :])  # without the first frame, which counts the others
    told: list[str] = []
    wave = read_audio(path, tell=told.append)
    assert (
        len(told) == 1 and "a.mp3 does not say how long it is: it has 2.0 s and begins 25 ms late" in told[0]
    )
    assert 0 <= wave.shape[1] - 96_000 - 1_203 < 2_600  # 1,105 samples before, less than a frame behind


def test_a_playlist_is_not_followed(tmp_path):
    _record(tmp_path / "a.aac")
    entry = f"#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\n{tmp_path / 'a.aac'}\n"
    (tmp_path / "list.m4a").write_text(entry)
    with pytest.raises(AudioError, match="not readable"):
        read_audio(tmp_path / "list.m4a")


def test_16_bits_are_dithered_and_keep_what_they_hold(tmp_path):
    held = torch.arange(-32_768, 32_768).repeat(2, 1) / 32_768
    faint = 0.4 / 32_768 * torch.sin(2 * torch.pi * 440 * torch.arange(48_000) / 48_000).repeat(2, 1)
    for name, wave in (("a.wav", held), ("b.wav", faint), ("c.wav", faint)):
        write_audio(tmp_path / name, wave)
    assert torch.equal(read_audio(tmp_path / "a.wav"), held)
    spectrum = torch.fft.rfft(read_audio(tmp_path / "b.wav")[0]).abs() / 24_000 * 32_768
    assert float(spectrum[440]) == pytest.approx(0.4, abs=0.02)  # without noise nothing would be left of it
    assert float(spectrum[441:].max()) < 0.04
    assert (tmp_path / "b.wav").read_bytes() == (tmp_path / "c.wav").read_bytes()


@pytest.mark.parametrize(
    ("name", "subtype", "error"), [("a.flac", "PCM_24", 2e-7), ("a.mp3", "MPEG_LAYER_III", 0.05)]
)
def test_what_is_written_is_what_its_name_says(tmp_path, name, subtype, error):
    wave = 0.3 * torch.sin(torch.arange(48_000) / 50).repeat(2, 1)
    write_audio(tmp_path / name, wave, subtype=subtype)
    assert soundfile.info(tmp_path / name).format == name[2:].upper()
    torch.testing.assert_close(read_audio(tmp_path / name), wave, atol=error, rtol=0)


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
