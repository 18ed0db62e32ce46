"""Validation loss against hours and size: points, table, picture, and going on after an interruption."""

import json
from pathlib import Path

import pytest
import torch

from duotok.recipes.lm.data import choose_hours
from duotok.recipes.lm.tokens import TokenIndex, TokenSong, append_shard
from duotok.recipes.research.scaling import main, read_sizes
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer


def test_fewer_hours_are_some_of_the_songs_of_more():
    songs = [
        TokenSong(id=f"{n}", song=f"{n // 2}", split="train", shard=0, start=0, frames=100) for n in range(40)
    ]
    few, more = choose_hours(songs, 950), choose_hours(songs, 2000)
    assert [len(few), len(more), len(choose_hours(songs, 1e9))] == [10, 20, 40]
    assert few == more[:10] and few != songs[:10]


def test_a_size_is_settings_of_the_model():
    assert read_sizes(["small=", "wide=layers:3,heads:2"]) == {
        "small": [],
        "wide": ["model.layers=3", "model.heads=2"],
    }
    for bad in ("layers:3", "a b=layers:3", "wide=layers"):
        with pytest.raises(ConfigError, match="NAME=KEY:VALUE"):
            read_sizes([bad])


def test_a_point_of_every_size_and_hours_is_measured_once(
    small_tokenizer_folder: Path, tmp_path: Path, capsys
):
    tokenizer = DuoTokenizer.from_pretrained(small_tokenizer_folder)
    sizes = {track: tokenizer.codebook_size(track) for track in ("vocal", "accompaniment")}
    index = TokenIndex(
        tokenizer_fingerprint=str(tokenizer.fingerprint), codebook_sizes=sizes, frame_rate_hz=25.0, songs=[]
    )
    tokens = tmp_path / "tokens"
    tokens.mkdir()
    pairs = {
        f"{n}": (f"{n}", "train", {track: torch.randint(0, size, (250,)) for track, size in sizes.items()})
        for n in range(20)
    }
    append_shard(tokens, index, pairs)
    command = [
        "recipes/lm/tiny.yaml",
        "--hours",
        "0.05",
        "0.02",
        "--steps",
        "2",
        "--out",
        str(tmp_path / "out"),
    ]
    command += ["--set", f"tokenizer={small_tokenizer_folder}", "--set", f"data.tokens={tokens}"]
    command += [
        "--set",
        "data.hold_out=0.2",
        "--set",
        "data.windows=[[4.0,1]]",
        "--set",
        "validation.windows=2",
    ]
    command += ["--size", "small=layers:1", "--size", "more=layers:2"]
    assert main(command) == 0
    points = json.loads((tmp_path / "out" / "scaling.json").read_text())["points"]
    assert [list(found) for found in points.values()] == [["0.02", "0.05"]] * 2
    assert points["more"]["0.02"]["weights"] > points["small"]["0.05"]["weights"]
    table = (tmp_path / "out" / "scaling.md").read_text()
    assert len(table.splitlines()) == 8 and (tmp_path / "out" / "scaling.png").stat().st_size > 10_000
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("point.json")}
    capsys.readouterr()
    assert main(command) == 0 and table in capsys.readouterr().out
    assert len(written) == 4 and all(path.stat().st_mtime_ns == time for path, time in written.items())
    assert main([*command, "--set", "data.hold_out=0", "--out", str(tmp_path / "none")]) == 1
    assert "nothing is held out" in capsys.readouterr().err
