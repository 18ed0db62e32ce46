"""Recordings of real singers: every system is measured alike, and what a folder lacks is said."""

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duotok.recipes.evaluation import score, table

RATE = 44_100


def play(pitches: list[int], seconds: float) -> np.ndarray:
    times = np.arange(round(seconds * RATE)) / RATE
    wave = sum(np.sin(2 * np.pi * times * 440 * 2 ** ((pitch - 69) / 12)) for pitch in pitches)
    return 0.1 * np.repeat(wave[:, None] * (0.3 + (times % 0.5 < 0.1))[:, None], 2, axis=1)


@pytest.fixture
def recordings(tmp_path, make_singing) -> Path:
    """Three singers, a band that fits them, and two systems: one that copies it, and one out of key."""
    folder = tmp_path / "recordings"
    for number in range(3):
        band = play([48 + number, 52 + number, 55 + number], 6.0)
        sounds = {"vocal": make_singing(6.0, rate_hz=RATE, seed=number), "accompaniment": band}
        sounds |= {"The Copyist": band, "Other": play([54, 58, 61], 5.5)}
        for part, wave in sounds.items():
            (folder / part).mkdir(parents=True, exist_ok=True)
            soundfile.write(folder / part / f"song {number}.flac", wave, RATE)
    return folder


def test_all_systems_are_measured_alike(recordings, tiny_bundle, tmp_path):
    out = tmp_path / "results.json"
    command = ["singers", "--recordings", str(recordings), "--bundle", str(tiny_bundle), "--out", str(out)]
    assert score.main(command) == 0
    figures = {name.removeprefix("singers."): value for name, value in json.loads(out.read_text()).items()}
    shown = {key for rows in table.ROWS.values() for row in rows for key in row.keys if "singers." in key}
    assert shown and {key.removeprefix("singers.") for key in shown} <= set(figures)
    assert figures["recordings"] == 3 and figures["seconds"] == pytest.approx(18)
    for name in ("harmony", "in_key", "beat_f", "kernel_distance"):
        for system in ("", "_real", "_the_copyist", "_other"):
            assert np.isfinite(figures[name + system])
            assert name == "kernel_distance" or f"{name}{system}_mismatched" in figures
    for name in ("harmony", "in_key", "beat_f"):
        assert figures[f"{name}_the_copyist"] == pytest.approx(figures[f"{name}_real"])
    assert figures["harmony_other"] < figures["harmony_the_copyist"]
    assert figures["kernel_distance_the_copyist"] < figures["kernel_distance_other"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ("nothing given", "give --recordings FOLDER"),
        ("no folder", "is no folder"),
        ("no band", "has no recordings in vocal/ and accompaniment/"),
        ("one missing", "has no song 1, which is in vocal/"),
        ("one singer", "give at least two"),
    ],
)
def test_what_is_missing_is_said_in_one_line(damage, message, recordings, tiny_bundle, tmp_path, capsys):
    command = ["singers", "--bundle", str(tiny_bundle), "--out", str(tmp_path / "results.json")]
    if damage == "no folder":
        recordings = tmp_path / "nowhere"
    elif damage == "no band":
        (recordings / "accompaniment").rename(tmp_path / "elsewhere")
    elif damage == "one missing":
        (recordings / "Other" / "song 1.flac").unlink()
    elif damage == "one singer":
        for number in (1, 2):
            (recordings / "vocal" / f"song {number}.flac").unlink()
    if damage != "nothing given":
        command += ["--recordings", str(recordings)]
    assert score.main(command) == 1
    told = capsys.readouterr().err.strip()
    assert message in told and "\n" not in told
    assert not (tmp_path / "results.json").exists()


def test_other_parts_need_a_corpus(capsys, tmp_path):
    with pytest.raises(SystemExit) as stopped:
        score.main(["generate", "--out", str(tmp_path / "results.json")])
    assert stopped.value.code == 2 and "--corpus is required" in capsys.readouterr().err
