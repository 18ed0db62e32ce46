"""Manifest lines: what is written is what is read, and errors name the line."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import (
    Item,
    append_items,
    item_from_line,
    item_to_line,
    read_manifest,
    write_manifest,
)
from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.tokenizer.common.audio import change_speed
from duotok.tokenizer.common.errors import ConfigError, DataError


@pytest.fixture
def item(tiny_corpus: Path) -> Item:
    """An item with a score."""
    return read_manifest(tiny_corpus / "train.jsonl")[0]


def test_written_items_are_read_back(item: Item, tmp_path: Path):
    keys = [(0.0, 0.5, "C:maj")]
    items = [replace(item, id=name, root=tmp_path, keys=keys if name == "b" else []) for name in "abc"]
    band = {"drums": [[0, True, [[0.0, 0.1, 36, 100]]]], "bass": [], "other": [[24, False, []]]}
    items[2] = replace(items[2], band=band, beats_per_bar=3)
    write_manifest(tmp_path / "train.jsonl", items[:2])
    append_items(tmp_path / "train.jsonl", items[2:])
    assert read_manifest(tmp_path / "train.jsonl") == items
    assert [path.name for path in tmp_path.iterdir()] == ["train.jsonl"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda _: "not json", "not JSON"),
        (lambda _: "[1, 2]", "not a JSON object"),
        (lambda _: '{"id": "x"}', "missing fields"),
        (lambda line: line.replace('"split":"train"', '"split":"dev"'), "split must be one of"),
        (lambda line: line.replace('"drums"', '"drum"'), "stems must be"),
        (lambda line: line.replace('"la"', '"la","high"'), "bad value"),
        (lambda line: line[:-1] + ',"beats_per_bar":5}', "beats_per_bar must be one of"),
        (lambda line: line[:-1] + ',"band":{"vocal":[]}}', "bad value: band must"),
        (lambda line: line[:-1] + ',"band":{"bass":[[128,false,[]]]}}', "program 128"),
        (lambda line: line[:-1] + ',"band":{"bass":[[1,false,[[0,1,40]]]]}}', "a note must be"),
        (lambda line: line[:-1] + ',"band":{"bass":[[1,false,[[0,NaN,40,90]]]]}}', "end after its start"),
        (lambda line: line[:-1] + ',"band":{"bass":[[1,false,[[0,1,40.5,90]]]]}}', "whole numbers"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(item: Item, tmp_path: Path, change, reason: str):
    line = item_to_line(item)
    (tmp_path / "train.jsonl").write_text(f"{line}\n{change(line)}\n", encoding="utf-8")
    with pytest.raises(DataError, match=f"line 2: .*{reason}"):
        read_manifest(tmp_path / "train.jsonl")
    with pytest.raises(DataError, match="none.jsonl"):
        read_manifest(tmp_path / "none.jsonl")


def test_accompaniment_is_the_sum_of_its_stems(item: Item):
    part = {"start_seconds": 1.0, "seconds": 0.5}
    stems = [item.read(stem, **part) for stem in ("drums", "bass", "other")]
    accompaniment = item.read("accompaniment", **part)
    assert accompaniment.shape == (2, 24_000)
    assert torch.equal(accompaniment, stems[0] + stems[1] + stems[2])
    mix = item.read("mix", **part)
    assert torch.allclose(mix, accompaniment + item.read("vocal", **part), atol=5 / 32_768)


def test_unknown_parts_are_refused(item: Item):
    with pytest.raises(DataError, match="guitar"):
        item.read("guitar")
    with pytest.raises(DataError, match="accompaniment"):
        item.path("accompaniment")
    with pytest.raises(DataError, match="seconds"):
        replace(item, seconds=np.float64(0.0))
    with pytest.raises(DataError, match="without audio"):
        replace(item, mix="").read("vocal")


def test_lyrics_and_unknown_key_and_tempo_are_kept(item: Item):
    assert "lyrics" not in item_to_line(item) and item.lyrics == []  # as lines of scores always were
    real = replace(item, lyrics=[(1.0, 3.0, "hello"), (3.5, 6.0, "")], notes=[], key=None, tempo_bpm=None)
    assert item_from_line(item_to_line(real), item.root) == real
    broken = item_to_line(real).replace("[1.0,3.0,", '["x",3.0,')
    with pytest.raises(DataError, match="bad value"):
        item_from_line(broken, item.root)


def test_text_is_whole_sentences_or_whole_syllables(item: Item):
    notes = [(0.0, 1.0, 60, "a"), (1.0, 1.5, 62, "-"), (1.5, 2.0, 60, "b"), (2.0, 3.0, 60, "c")]
    scored = replace(item, notes=notes)
    assert scored.text_between(0.0, 2.5) == "a b" and scored.text_between(0.5, 3.0) == "b c"
    worded = replace(scored, lyrics=[(0.0, 2.0, "hello"), (2.5, 3.0, "there"), (4.0, 5.0, "")])
    assert worded.text_between(0.0, 3.0) == "hello there" and worded.text_between(0.5, 3.5) == "there"
    assert worded.text_between(3.9, 5.1) == ""


def test_singing_is_counted_by_notes_or_else_by_lyrics(item: Item):
    notes = [(0.0, 1.0, 60, "a"), (2.0, 4.0, 60, "b")]
    assert replace(item, notes=notes).sung_between(0.5, 3.0) == pytest.approx(1.5)
    real = replace(item, notes=[], lyrics=[(1.0, 3.0, "x"), (4.0, 6.0, "")])
    assert real.sung_between(2.0, 5.0) == pytest.approx(2.0)
    assert replace(real, lyrics=[]).sung_between(0.0, 9.0) == 0.0


def test_cuts_of_real_songs_begin_with_a_sentence_and_vocals_come_from_sung_items(tiny_corpus, tmp_path):
    first, second = (
        replace(item, stems={stem: str(item.path(stem)) for stem in item.stems}, mix=str(item.path("mix")))
        for item in read_manifest(tiny_corpus / "train.jsonl")[:2]
    )
    sung = replace(first, notes=[], lyrics=[(1.0, 2.5, "one two"), (4.5, 6.0, "three")])
    instrumental = replace(second, notes=[], lyrics=[])
    write_manifest(tmp_path / "songs.jsonl", [sung, instrumental])
    sampler = CutSampler(CutConfig(manifest=str(tmp_path / "songs.jsonl"), seconds=2.0))
    cuts = [sampler.cut(np.random.default_rng(seed), "vocal") for seed in range(12)]
    assert {cut.lines[0][2] for cut in cuts} == {"one two", "three"}
    assert all(0 <= begin < end <= 2.0 for cut in cuts for begin, end, _ in cut.lines)
    assert all(cut.stems[0].any() and not cut.stems[1:].any() for cut in cuts)
    others = [sampler.cut(np.random.default_rng(seed), "instrumental") for seed in range(12)]
    assert not any(cut.lines or cut.stems[0].any() for cut in others)


def test_speed_changes_pitch_and_the_times_of_the_words(tiny_corpus):
    config = CutConfig(manifest=str(tiny_corpus / "train.jsonl"), seconds=2.0, speed_semitones=3)
    sampler = CutSampler(config)
    speeds = {sampler._draw_speed(np.random.default_rng(seed), 60.0) for seed in range(80)}
    assert sorted(round(12 * np.log2(speed)) for speed in speeds) == [-3, -2, -1, 0, 1, 2, 3]
    assert sampler._draw_speed(np.random.default_rng(0), 2.0) <= 1.0  # no more is read than there is
    wave = torch.sin(2 * torch.pi * 440 * torch.arange(48_000) / 48_000)
    faster = change_speed(wave[None], 2 ** (3 / 12))[0]
    assert len(faster) == round(48_000 / 2 ** (3 / 12))
    peak_hz = int(torch.fft.rfft(faster).abs().argmax()) * 48_000 / len(faster)
    assert peak_hz == pytest.approx(440 * 2 ** (3 / 12), rel=0.005)
    for seed in range(6):
        cut = sampler.cut(np.random.default_rng(seed), "vocal")
        assert cut.stems.shape == (4, 96_000) and cut.stems[0].any()
        assert all(-1e-3 <= begin < end <= 2.0 + 1e-3 for begin, end, _ in cut.lines)
    with pytest.raises(ConfigError, match="speed_semitones"):
        CutConfig(manifest="x", speed_semitones=-1)
