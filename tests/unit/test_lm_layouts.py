"""The comparison of layouts, tiny, from token shards to the table."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from duotok.lm.dual_track.model import DualTrackLM
from duotok.recipes.lm.tokens import TokenIndex, append_shard
from duotok.recipes.research import layouts
from duotok.tokenizer.model import DuoTokenizer

RECIPE = Path(layouts.__file__).parent / "tiny.yaml"
SIZES = {"vocal": 11, "accompaniment": 13}


def write_tokens(folder: Path, fingerprint: str, songs: int) -> None:
    torch.manual_seed(songs)
    index = TokenIndex(tokenizer_fingerprint=fingerprint, codebook_sizes=SIZES, frame_rate_hz=25.0)
    pairs = {
        f"item-{n}": (f"song-{n}", "train", {t: torch.randint(0, size, (150,)) for t, size in SIZES.items()})
        for n in range(songs)
    }
    append_shard(folder, index, pairs)


def test_layouts_are_trained_measured_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], make_small_tokenizer: Callable[..., DuoTokenizer]
) -> None:
    tokenizer = tmp_path / "tokenizer"
    fingerprint = str(make_small_tokenizer(tokenizer).fingerprint)
    write_tokens(tmp_path / "train", fingerprint, 6)
    write_tokens(tmp_path / "held-out", fingerprint, 4)
    write_tokens(tmp_path / "other", "ffffffffffffffff", 4)
    command = [str(RECIPE), "--out", str(tmp_path / "out"), "--steps", "2", "--set", f"tokenizer={tokenizer}"]
    command += ["--set", f"data.tokens={tmp_path / 'train'}"]
    held_out = ["--held-out", str(tmp_path / "held-out")]

    assert layouts.main([*command, "--held-out", str(tmp_path / "other"), "--seconds", "5"]) == 1
    assert "another tokenizer" in capsys.readouterr().err
    assert layouts.main([*command, *held_out]) == 1  # windows of 30 s, songs of 6 s
    assert "give shorter --seconds" in capsys.readouterr().err
    assert layouts.main([*command, *held_out, "--seconds", "6"]) == 0
    printed = capsys.readouterr().out
    table = json.loads((tmp_path / "out" / "table.json").read_text())
    assert list(table["layouts"]) == list(layouts.LAYOUTS)
    assert all(f"| {name} | " in printed for name in layouts.LAYOUTS)
    values = [row["cnbpt_vocal_to_accompaniment"] for row in table["layouts"].values()]
    assert len(set(values)) == 3 and all(0.5 < value < 2 for value in values)
    for name, changes in layouts.LAYOUTS.items():
        config = DualTrackLM.from_pretrained(tmp_path / "out" / name.replace(" ", "-") / "final").config
        assert {key: getattr(config, key) for key in changes} == changes

    kept = (tmp_path / "out" / "plain-prompt" / "final" / "model.safetensors").stat().st_mtime_ns
    assert layouts.main([*command, *held_out, "--seconds", "6"]) == 0
    assert capsys.readouterr().out == printed
    assert (tmp_path / "out" / "plain-prompt" / "final" / "model.safetensors").stat().st_mtime_ns == kept
