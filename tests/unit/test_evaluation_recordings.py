"""The VAE alone on real recordings: which stretches are heard, what is told of them, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from torch import Tensor

from duotok.recipes.corpus.songs.recordings import find_songs
from duotok.recipes.evaluation import score
from duotok.recipes.evaluation.renderer_part import (
    compare_sounds,
    measure_recordings,
    measure_vae,
    read_pieces,
)
from duotok.renderer.spectral_vae import SpectralVAE
from duotok.tokenizer.common.errors import AudioError, DataError

RATE = 48_000


def play(seconds: float, frequency_hz: float) -> np.ndarray:
    """A tone left of the middle [samples, 2]."""
    times = np.arange(round(seconds * RATE)) / RATE
    return 0.1 * np.sin(2 * np.pi * frequency_hz * times)[:, None] * np.array([1.0, 0.5])


def write(path: Path, data: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, data, RATE, subtype="FLOAT")
    return path


@pytest.fixture(scope="module")
def vae(tiny_components) -> SpectralVAE:
    torch.set_num_threads(1)
    return SpectralVAE.from_pretrained(tiny_components["vae"])


def test_every_recording_is_named_and_counts_the_same(vae, tmp_path):
    write(tmp_path / "My Song (live).wav", play(9.0, 220))  # two stretches of 4 s
    write(tmp_path / "short.wav", play(2.0, 330))
    figures = measure_recordings(vae, tmp_path, 4.0)
    assert figures.pop("recordings") == 2
    for name in ("chroma_correlation", "fine_structure_300_1000_hz", "log10_mel_l1", "loudness_error_lu"):
        each = [figures[f"recording_{song}_vae_{name}"] for song in ("my_song_live", "short")]
        assert figures[f"recordings_vae_{name}"] == pytest.approx(np.mean(each))
        assert each[0] != each[1]
    assert all(np.isfinite(value) for value in figures.values())


def test_stems_are_heard_as_their_sum(vae, tmp_path):
    waves = {"vocal": play(2.0, 220), "other": play(2.0, 330)[:, ::-1], "bass": play(1.9, 110)}
    for stem, data in waves.items():
        write(tmp_path / "stems" / "song" / f"{stem}.wav", data)
    write(tmp_path / "mix.wav", np.sum([data[: round(1.9 * RATE)] for data in waves.values()], axis=0))
    found = measure_recordings(vae, tmp_path / "stems", 4.0)
    expected = measure_vae(vae, torch.from_numpy(soundfile.read(tmp_path / "mix.wav", dtype="float32")[0].T))
    for name, value in expected.items():
        assert found[f"recording_song_vae_{name}"] == pytest.approx(value, rel=1e-3, abs=5e-3)  # 16 bits


def test_stretches_are_spread_and_the_silent_ones_left_out(tmp_path):
    ramp = np.linspace(0, 1, 40 * RATE)[:, None].repeat(2, axis=1)
    ramp[: 12 * RATE] = 0
    write(tmp_path / "ramp.wav", ramp)
    pieces = read_pieces(find_songs(tmp_path)[0], 4.0)
    assert [tuple(piece.shape) for piece in pieces] == [(2, 4 * RATE)] * 3
    middles = [float(piece.mean()) * 40 for piece in pieces]
    assert middles == pytest.approx([15, 25, 35], abs=0.01)


def test_width_and_loudness_are_told_apart(vae):
    wave = torch.randn(2, RATE, generator=torch.Generator().manual_seed(0)) * 0.1
    assert compare_sounds(wave, 0.5 * wave)["stereo_width_error_db"] == pytest.approx(0, abs=1e-3)

    def narrow(share: float) -> Tensor:
        return wave.mean(dim=0) + share * (wave - wave.mean(dim=0))

    errors = [compare_sounds(wave, narrow(share))["stereo_width_error_db"] for share in (1.0, 0.5, 0.25)]
    assert errors == pytest.approx([0, 6.02, 12.04], abs=0.05)


def test_what_cannot_be_measured_is_refused(vae, tmp_path):
    for seconds, level, told in ((2.0, 0.0, "silent"), (0.5, 1.0, "0.50 s"), (0.0, 1.0, "0.00 s")):
        write(tmp_path / "song.wav", level * play(seconds, 220))
        with pytest.raises(DataError, match=told):
            measure_recordings(vae, tmp_path, 4.0)
    (tmp_path / "song.wav").write_bytes(b"no audio at all")
    with pytest.raises(AudioError, match="song.wav"):
        measure_recordings(vae, tmp_path, 4.0)


def test_the_command_measures_a_vae_alone(tiny_corpus, tiny_components, tmp_path, capsys):
    write(tmp_path / "real" / "song.wav", play(2.0, 220))
    out = tmp_path / "results.json"
    options = ["--corpus", str(tiny_corpus), "--out", str(out), "--items", "2", "--seconds", "4"]
    alone = ["renderer", *options, "--vae", str(tiny_components["vae"])]
    assert score.main([*alone, "--recordings", str(tmp_path / "real")]) == 0
    figures = json.loads(out.read_text())
    assert figures["renderer.recordings"] == 1 and "renderer.vae_loudness_error_lu" in figures
    assert not [name for name in figures if "round_trip" in name]
    capsys.readouterr()
    assert score.main([*alone, "--recordings", str(tmp_path / "none")]) == 1
    assert "none does not exist" in capsys.readouterr().err.splitlines()[-1]
    assert score.main(["renderer", *options, "--vae", str(tiny_components["tokenizer"])]) == 1
    assert json.loads(out.read_text()) == figures
