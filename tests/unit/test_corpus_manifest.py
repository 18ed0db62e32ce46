"""Manifest lines: what is written is what is read, and errors name the line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import Item, append_items, item_to_line, read_manifest, write_manifest
from duotok.tokenizer.common.errors import DataError


def make_item(root: Path, name: str = "train-00000") -> Item:
    return Item(
        id=name,
        split="train",
        source="pop909",
        song="001",
        seconds=1.0,
        sample_rate_hz=48_000,
        stems={stem: f"audio/{name}/{stem}.wav" for stem in ("vocal", "drums", "bass", "other")},
        mix=f"audio/{name}/mix.wav",
        tempo_bpm=90.0,
        beats_seconds=[0.0, 0.5],
        downbeats_seconds=[0.0],
        chords=[(0.0, 1.0, "C:maj")],
        key="C:maj",
        notes=[(0.0, 0.5, 60, "la")],
        voice="alpha",
        style="ballad",
        root=root,
    )


def test_written_items_are_read_back(tmp_path: Path):
    items = [make_item(tmp_path, "a"), make_item(tmp_path, "b")]
    write_manifest(tmp_path / "train.jsonl", items)
    append_items(tmp_path / "train.jsonl", [make_item(tmp_path, "c")])
    assert read_manifest(tmp_path / "train.jsonl") == [*items, make_item(tmp_path, "c")]
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    "line, reason",
    [
        ("not json", "not JSON"),
        ("[1, 2]", "not a JSON object"),
        ('{"id": "x"}', "missing fields"),
        (item_to_line(make_item(Path())).replace('"train"', '"dev"'), "split must be one of"),
        (item_to_line(make_item(Path())).replace('"drums"', '"drum"'), "stems must be"),
        (item_to_line(make_item(Path())).replace("60", '"high"'), "bad value"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: str, reason: str):
    path = tmp_path / "train.jsonl"
    path.write_text(item_to_line(make_item(tmp_path)) + "\n" + line + "\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"line 2: .*{reason}"):
        read_manifest(path)


def test_a_missing_manifest_is_named(tmp_path: Path):
    with pytest.raises(DataError, match="none.jsonl"):
        read_manifest(tmp_path / "none.jsonl")


def test_accompaniment_is_the_sum_of_its_stems(tiny_corpus: Path):
    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    part = {"start_seconds": 1.0, "seconds": 0.5}
    stems = [item.read(stem, **part) for stem in ("drums", "bass", "other")]
    accompaniment = item.read("accompaniment", **part)
    assert accompaniment.shape == (2, 24_000)
    assert torch.equal(accompaniment, stems[0] + stems[1] + stems[2])
    mix = item.read("mix", **part)
    assert torch.allclose(mix, accompaniment + item.read("vocal", **part), atol=5 / 32_768)


def test_unknown_parts_are_refused(tiny_corpus: Path):
    item = read_manifest(tiny_corpus / "train.jsonl")[0]
    with pytest.raises(DataError, match="guitar"):
        item.read("guitar")
    with pytest.raises(DataError, match="accompaniment"):
        item.path("accompaniment")
    with pytest.raises(DataError, match="seconds"):
        replace(item, seconds=np.float64(0.0))
