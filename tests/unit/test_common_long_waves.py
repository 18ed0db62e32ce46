import os

import pytest
import torch

from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.accompany.mix import load_vocal, measure_loudness, mix_down
from duotok.tokenizer.common import long_waves
from duotok.tokenizer.common.audio import read_audio, write_audio
from duotok.tokenizer.common.chunks import join_chunks, plan_chunks
from duotok.tokenizer.common.errors import AudioError
from duotok.tokenizer.common.long_waves import amplify, blocks, let_go, map_blocks, new_wave, peak
from duotok.tokenizer.music.chroma import measure_chroma
from duotok.tokenizer.music.pitch import sung_pitch
from duotok.tokenizer.music.tempo import onset_envelope
from duotok.tokenizer.spectra import level_gain


@pytest.fixture
def on_disk(monkeypatch):
    monkeypatch.setattr(long_waves, "LARGEST_IN_MEMORY_BYTES", 1_000)


def noise(samples: int = 5 * 48_000 + 77) -> torch.Tensor:
    return 0.3 * torch.randn(2, samples, generator=torch.Generator().manual_seed(1))


def mapped_bytes() -> int:
    """Memory in use for files."""
    with open("/proc/self/status") as file:
        return sum(int(line.split()[1]) * 1024 for line in file if line.startswith(("RssFile", "RssShmem")))


@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="memory as Linux tells it")
def test_a_wave_on_disk_needs_memory_for_one_block_only(monkeypatch):
    monkeypatch.setattr(long_waves, "LARGEST_IN_MEMORY_BYTES", 10_000_000)
    wave, before = new_wave(2, 16_000_000), mapped_bytes()
    most = 0
    for place, (block,) in blocks(wave, samples=1_000_000):
        block.copy_(torch.arange(place.start, place.start + 1_000_000).expand(2, -1))
        most = max(most, mapped_bytes() - before)
    assert 7_000_000 < most < 30_000_000  # of 128 MB
    assert peak(wave) == 15_999_999 and mapped_bytes() - before < 30_000_000
    assert torch.equal(wave[1, 3_999_999:4_000_001], torch.tensor([3_999_999.0, 4_000_000.0]))


def test_on_disk_is_as_in_memory(on_disk, tmp_path):
    """All that `generate` does with a recording comes out the same, wherever it rests."""
    wave = noise()
    write_audio(tmp_path / "a.wav", wave, subtype="FLOAT")
    resting = read_audio(tmp_path / "a.wav")
    assert torch.equal(resting, wave)
    let_go(resting)
    assert torch.equal(resting, wave)
    assert peak(resting) == float(wave.abs().max())
    assert torch.equal(map_blocks(torch.add, resting, wave), wave + wave)
    assert torch.equal(amplify(map_blocks(torch.neg, resting), 0.5), -0.5 * wave)
    assert torch.equal(level_gain(resting[None]), level_gain(wave.mean(dim=0, keepdim=True)))
    for measure in (measure_chroma, sung_pitch, onset_envelope):
        assert (measure(resting) == measure(wave)).all() or measure is sung_pitch
    assert measure_loudness(resting) == measure_loudness(wave)
    loud = load_vocal(tmp_path / "a.wav")
    assert torch.equal(loud.wave, wave / wave.abs().max()) and "full scale" in loud.warnings[0]
    mixdown = mix_down(resting, resting, accompaniment_db=-3.0)
    write_audio(tmp_path / "b.wav", mixdown.mix, subtype="FLOAT")
    assert torch.equal(read_audio(tmp_path / "b.wav"), mixdown.mix) and peak(mixdown.mix) <= 0.981


def test_no_room_on_the_disk_is_one_line(on_disk, monkeypatch):
    monkeypatch.setenv("TMPDIR", "/dev/shm")
    with pytest.raises(AudioError, match=r"has no room for 8000000.0 GB of sound: make room"):
        new_wave(2, 10**15)


def test_not_a_number_is_found_anywhere(on_disk):
    for value in (torch.nan, torch.inf, -torch.inf):
        wave = new_wave(2, 2_000_000)
        wave[1, 1_999_999] = value
        assert not abs(peak(wave)) < torch.inf
    assert peak(torch.zeros(2, 0)) == 0


@pytest.mark.parametrize(("frames", "size", "halo", "grain"), [(1, 4, 3, 1), (23, 5, 2, 1), (24, 8, 3, 4)])
def test_chunks_joined_are_one_pass(frames, size, halo, grain):
    """A running mean over `halo` frames to each side, two values per frame."""
    given = torch.arange(frames, dtype=torch.float64)

    def compute(low: int, high: int) -> torch.Tensor:
        around = torch.nn.functional.pad(given[low:high], (halo, halo)).unfold(0, 2 * halo + 1, 1).sum(dim=-1)
        return torch.stack([around, -around], dim=1).reshape(1, -1)

    assert torch.equal(join_chunks(frames, compute, size=size, halo=halo, rate=2), compute(0, frames))
    chunks = list(plan_chunks(frames, size, halo, grain=grain))
    assert [frame for chunk in chunks for frame in range(chunk.start, chunk.stop)] == list(range(frames))
    assert all(chunk.low % grain == 0 and chunk.low <= max(0, chunk.start - halo) for chunk in chunks)
    assert all(chunk.high == min(frames, chunk.stop + halo) for chunk in chunks)


@torch.no_grad()
def test_the_sheet_reader_in_chunks_is_the_reader_of_one_pass(monkeypatch):
    torch.manual_seed(2)
    reader = SheetReader(SheetReaderConfig(vocal_codes=11, code_dim=4, dim=8, dilations=(1, 2, 4))).eval()
    reader.vectors.normal_()
    codes = torch.randint(12, (2, 301))
    whole, sheet = reader(codes), reader.read(codes)
    monkeypatch.setattr("duotok.lm.sheet.reader.CHUNK_FRAMES", 60)
    chunked = reader.listen(codes)
    for name in ("place", "chord"):
        torch.testing.assert_close(chunked[name], whole[name])
    assert (reader.read(codes) == sheet).float().mean() > 0.99
