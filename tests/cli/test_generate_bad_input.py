import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from duotok.recipes.accompany.bundle import default_bundle, read_styles
from duotok.recipes.accompany.generate import main


def fail(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run the command, which must fail with exit code 1 and one line on stderr, and return that line."""
    assert main([str(argument) for argument in arguments]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1 and printed.err.endswith("\n")
    return printed.err


def truncated_header(path: Path, singing: np.ndarray) -> None:
    soundfile.write(path, singing, 48_000)
    path.write_bytes(path.read_bytes()[:30])


def with_nan(path: Path, singing: np.ndarray) -> None:
    singing = singing.copy()
    singing[40_000] = np.nan
    soundfile.write(path, singing, 48_000, subtype="FLOAT")


BAD_VOCALS = {
    "missing": (lambda path, singing: None, "does not exist"),
    "folder": (lambda path, singing: path.mkdir(), "is a folder"),
    "text": (lambda path, singing: path.write_text("la la la\n" * 100), "not readable as audio"),
    "empty file": (lambda path, singing: path.write_bytes(b""), "not readable as audio"),
    "no samples": (lambda path, singing: soundfile.write(path, singing[:0], 48_000), "no samples"),
    "short": (lambda path, singing: soundfile.write(path, singing[:40_000], 48_000), "at least 1 s"),
    "silent": (lambda path, singing: soundfile.write(path, 0 * singing, 48_000), "silent"),
    "nan": (with_nan, "NaN"),
    "truncated header": (truncated_header, "not readable as audio"),
}


@pytest.mark.parametrize("kind", BAD_VOCALS)
def test_bad_vocals(kind, tiny_bundle, tmp_path, capsys, make_singing):
    make, message = BAD_VOCALS[kind]
    vocal = tmp_path / "in" / "song.wav"
    vocal.parent.mkdir()
    make(vocal, make_singing(1.5))
    line = fail(capsys, "--vocal", vocal, "--out", tmp_path / "out", "--model", tiny_bundle)
    assert message in line
    assert "song.wav" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write into")
def test_an_unwritable_output(tiny_bundle, vocal_file, capsys):
    line = fail(capsys, "--vocal", vocal_file, "--out", "/proc/duotok/out", "--model", tiny_bundle)
    assert "cannot write into /proc/duotok/out" in line


def test_bundles_that_cannot_be_used(tiny_bundle, vocal_file, tmp_path, capsys):
    bundle = tmp_path / "bundle"
    options = ["--vocal", vocal_file, "--out", tmp_path / "out", "--model", bundle]
    assert "has no bundle.json" in fail(capsys, *options)
    shutil.copytree(tiny_bundle, bundle)
    weights = bundle / "lm" / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    assert "model.safetensors is damaged" in fail(capsys, *options)
    weights.unlink()
    assert "model.safetensors is missing" in fail(capsys, *options)
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--steps=0", "steps must be from 1 to 1000, got 0"),
        ("--cfg=nan", "guidance (--cfg) must be"),
        ("--level=inf", "accompaniment_db (--level) must be"),
        ("--keep=2", "keep must be from 1 to variations (1), got 2"),
        ("--tempo=20", "tempo"),
        ("--separator=foo", "separator"),
        ("--without=drums,flute", "without must name any of drums, bass, chords, got 'flute'"),
        ("--without=bass, drums,chords", "nobody plays"),
        ("--meter=5/4", "meter must be 2/4, 3/4, 4/4 or 6/8, got '5/4'"),
        ("--intro=17", "intro must be from 0 to 16, got 17"),
    ],
)
def test_options_are_checked_before_anything_is_opened(option, message, tmp_path, capsys):
    options = ["--vocal", tmp_path / "none.wav", "--out", tmp_path / "out", "--model", tmp_path / "none"]
    assert message in fail(capsys, *options, option)
    assert list(tmp_path.iterdir()) == []


def test_what_a_model_cannot_play_is_one_line(tiny_bundle, vocal_file, tmp_path, capsys):
    options = ["--vocal", vocal_file, "--out", tmp_path / "out"]
    own = [*options, "--model", tiny_bundle]
    assert "style must be one of ballad, rock, waltz, got 'polka'" in fail(capsys, *own, "--style=polka")
    assert "no band in 6/8; it plays in 3/4, 4/4" in fail(capsys, *own, "--meter=6/8")
    if not read_styles(default_bundle()):
        line = fail(capsys, *options, "--style=rock", "--without=drums")
        assert line == "error: this model knows no styles; leave out --style, --without\n"
    assert "either a prefix or an intro" in fail(capsys, *own, "--prefix", vocal_file, "--intro=0")
    assert list(tmp_path.iterdir()) == []


def test_files_and_device_are_checked_before_the_model(vocal_file, tmp_path, capsys):
    options = ["--vocal", vocal_file, "--out", tmp_path / "out", "--model", tmp_path / "none"]
    assert "start.wav" in fail(capsys, *options, "--prefix", tmp_path / "start.wav")
    assert "song.lab" in fail(capsys, *options, "--chords", tmp_path / "song.lab")
    if not torch.cuda.is_available():
        assert "no cuda device" in fail(capsys, *options, "--device", "cuda")
    assert "is not a model" in fail(capsys, *options)


def test_an_error_from_a_shell_is_one_line(tiny_bundle, tmp_path):
    options = ["--vocal", "nothing.wav", "--model", str(tiny_bundle)]
    command = [sys.executable, "-m", "duotok.recipes.accompany.generate", *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=300)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: nothing.wav does not exist; check the path\n"
    assert list(tmp_path.iterdir()) == []
