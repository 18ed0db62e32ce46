"""`separate`, and `generate --mix`: a whole song instead of a clean vocal."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duotok.recipes.accompany import generate, separate
from duotok.recipes.accompany.bundle import assemble_bundle
from duotok.tokenizer.common.audio import read_audio

STEMS = ("vocal", "drums", "bass", "other")


@pytest.fixture(scope="module")
def song(tmp_path_factory, make_singing) -> Path:
    path = tmp_path_factory.mktemp("song") / "song.flac"
    noise = 0.02 * np.random.default_rng(0).standard_normal((2 * 44_100, 2))
    soundfile.write(path, make_singing(2.0, rate_hz=44_100, channels=2) + noise, 44_100)
    return path


def test_four_stems_sum_to_the_song_and_other_files_are_left_alone(song, tiny_separator, tmp_path):
    keep = [tmp_path / name for name in ("accompaniment.wav", "notes.txt")]
    for path in keep:
        path.write_text("mine")
    command = ["--mix", str(song), "--out", str(tmp_path), "--checkpoint", str(tiny_separator)]
    assert separate.main([*command, "--device", "cpu"]) == 0
    assert all(path.read_text() == "mine" for path in keep)
    made = {path.name for path in tmp_path.iterdir()} - {path.name for path in keep}
    assert made == {*(f"{stem}.wav" for stem in STEMS), "report.json"}
    stems = [soundfile.read(tmp_path / f"{stem}.wav", always_2d=True)[0] for stem in STEMS]
    assert all(stem.shape == (96_000, 2) for stem in stems)
    np.testing.assert_allclose(sum(stems), read_audio(song).T.numpy(), atol=1e-5)


def test_generate_from_a_whole_song_says_so(song, tiny_separator, tiny_components, tmp_path, capsys):
    bundle = assemble_bundle(tmp_path / "bundle", separator=tiny_separator, **tiny_components)
    command = ["--mix", str(song), "--out", str(tmp_path / "out"), "--model", str(bundle)]
    assert generate.main([*command, "--steps", "1", "--device", "cpu"]) == 0
    assert "separated from song.flac by mask-head" in capsys.readouterr().err
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert any("separated" in warning for warning in report["warnings"])
    vocal, rate = soundfile.read(tmp_path / "out" / "separated-vocal.wav", always_2d=True)
    assert rate == 48_000 and vocal.shape == (96_000, 2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--separator", "magic"], "choose one of"),
        (["--checkpoint", "nowhere"], "nowhere"),
        (["--mix", "nothing.wav"], "does not exist"),
    ],
)
def test_bad_input_is_one_line(arguments, told, song, tmp_path, capsys):
    command = ["--mix", str(song), "--out", str(tmp_path / "out"), "--device", "cpu", *arguments]
    assert separate.main(command) == 1
    message = capsys.readouterr().err.strip()
    assert told in message and "\n" not in message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--mix"], "has no separator"),
        (["--stems", "--vocal"], "has no separator"),
        (["--separator", "magic", "--stems", "--vocal"], "unknown separator 'magic'"),
    ],
)
def test_a_missing_separator_is_told_before_anything_is_made(
    options, told, song, tiny_bundle, tmp_path, capsys
):
    command = [*options, str(song), "--out", str(tmp_path / "out"), "--model", str(tiny_bundle)]
    assert generate.main([*command, "--device", "cpu"]) == 1
    printed = capsys.readouterr().err
    assert told in printed and printed.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_stems_of_the_accompaniment_sum_to_it(vocal_file, tiny_separator, tiny_components, tmp_path):
    bundle = assemble_bundle(tmp_path / "bundle", separator=tiny_separator, **tiny_components)
    out = tmp_path / "out"
    command = ["--vocal", str(vocal_file), "--out", str(out), "--model", str(bundle), "--stems"]
    assert generate.main([*command, "--steps", "1", "--device", "cpu"]) == 0
    report = json.loads((out / "report.json").read_text())
    assert report["stems"] == {stem: f"accompaniment-{stem}.wav" for stem in STEMS[1:]}
    waves = [soundfile.read(out / name, always_2d=True)[0] for name in report["stems"].values()]
    whole = soundfile.read(out / "accompaniment.wav", always_2d=True)[0]
    np.testing.assert_allclose(sum(waves), whole, atol=1e-4)
    # The next run without stems leaves none of the last one's.
    assert generate.main([*command[:-1], "--steps", "1", "--device", "cpu"]) == 0
    left = ["accompaniment.wav", "codes.safetensors", "mix.wav", "report.json"]
    assert sorted(path.name for path in out.iterdir()) == left
