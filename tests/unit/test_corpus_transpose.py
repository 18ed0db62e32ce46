"""Items that are the same files in another key and tempo."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.lm.sheet.columns import CHORD, PLACE, UNKNOWN
from duotok.recipes.corpus import transpose
from duotok.recipes.corpus.manifest import Item, item_from_line, item_to_line, read_manifest, write_manifest
from duotok.recipes.corpus.shards import pack_items, read_shards
from duotok.recipes.corpus.transpose import transpose_item
from duotok.recipes.lm.sheets import label_frames
from duotok.tokenizer.common.audio import write_audio
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.music.labels import triad_of


@pytest.fixture
def item(tmp_path: Path, tiny_corpus: Path) -> Item:
    """Four seconds; the vocal is 440 Hz, with a click at 3 s."""
    wave = 0.1 * torch.sin(2 * torch.pi * 440 * torch.arange(4 * 48_000) / 48_000).expand(2, -1).clone()
    wave[:, 3 * 48_000] = 1.0
    for stem in ("vocal", "drums", "bass", "other", "mix"):
        write_audio(tmp_path / f"{stem}.wav", wave)
    return replace(
        read_manifest(tiny_corpus / "train.jsonl")[0],
        id="a",
        seconds=4.0,
        stems={stem: f"{stem}.wav" for stem in ("vocal", "drums", "bass", "other")},
        mix="mix.wav",
        tempo_bpm=120.0,
        beats_seconds=[n / 2 for n in range(8)],
        downbeats_seconds=[0.0, 2.0],
        chords=[(0.0, 2.0, "B:min7"), (2.0, 3.0, "N"), (3.0, 4.0, "F#:maj/3")],
        key="B:min",
        notes=[(1.0, 2.0, 62, "la")],
        lyrics=[(1.0, 2.0, "la")],
        band={"drums": [[0, True, [[1.0, 1.1, 36, 90]]]], "bass": [[33, False, [[1.0, 2.0, 40, 90]]]]},
        root=tmp_path,
    )


def test_what_is_said_is_what_is_heard(item: Item) -> None:
    faster = transpose_item(item, 3)
    speed = 2 ** (3 / 12)
    for part in ("vocal", "accompaniment"):
        wave = faster.read(part, channels=1)[0]
        assert len(wave) == round(4 * 48_000 / speed) == round(faster.seconds * 48_000)
        assert int(wave.abs().argmax()) == pytest.approx(3 * 48_000 / speed, abs=2)
        spectrum = torch.fft.rfft(wave[:48_000]).abs()
        assert int(spectrum.argmax()) == pytest.approx(440 * speed, abs=2)
    assert faster.id == "a+3" and faster.song == item.song
    assert faster.tempo_bpm == pytest.approx(120 * speed, abs=1e-3)
    assert faster.beats_seconds == pytest.approx([n / 2 / speed for n in range(8)], abs=1e-4)
    assert faster.notes == [(round(1 / speed, 4), round(2 / speed, 4), 65, "la")]
    start = round(1 / speed, 3)
    assert [parts[0][2][0][0::2] for parts in faster.band.values()] == [[start, 36], [start, 43]]
    assert [label for *_, label in faster.chords] == ["D:min7", "N", "A:maj/3"] and faster.key == "D:min"
    chords, turned = (label_frames(each, 25.0)[:, CHORD] for each in (item, faster))
    assert turned[5] == triad_of("D:min") and chords[5] == triad_of("B:min")
    places = label_frames(faster, 25.0)[:, PLACE]
    assert int((places != UNKNOWN).sum()) == pytest.approx(2 * 25 / speed, abs=1)


def test_a_cut_is_where_the_whole_has_it_and_transposing_twice_adds_up(item: Item) -> None:
    lower = transpose_item(item, -4)
    whole = lower.read("vocal", channels=1)[0]
    cut = lower.read("vocal", start_seconds=3.0, seconds=1.0, channels=1)[0]
    assert len(cut) == pytest.approx(48_000, abs=1)
    assert int(cut.abs().argmax()) + 3 * 48_000 == pytest.approx(int(whole.abs().argmax()), abs=2)
    there, back = transpose_item(transpose_item(item, 5), -2), transpose_item(item, 3)
    assert there.semitones == back.semitones == 3 and there.key == back.key
    assert there.seconds == pytest.approx(back.seconds)
    home = transpose_item(transpose_item(item, 5), -5)
    assert torch.equal(home.read("vocal"), item.read("vocal"))
    assert transpose_item(item, 0) is item


def test_items_are_stored_and_streamed_with_their_speed(item: Item, tmp_path: Path) -> None:
    moved = transpose_item(item, -2)
    assert item_from_line(item_to_line(moved), tmp_path) == moved
    assert "semitones" not in item_to_line(item)
    with pytest.raises(DataError, match=r"semitones must be a whole number in -12\.\.12"):
        replace(item, semitones=13)
    pack_items([moved], tmp_path / "tars")
    (tar,) = (tmp_path / "tars").glob("*.tar")
    (streamed,) = read_shards(str(tar))
    heard = [each.read("accompaniment", channels=1) for each in (streamed, moved)]
    torch.testing.assert_close(*heard, rtol=0, atol=2e-4)


def test_the_command_writes_a_manifest_beside_the_other(item: Item, tmp_path: Path, capsys) -> None:
    write_manifest(tmp_path / "train.jsonl", [item, replace(item, id="b")])
    run = ["--manifest", str(tmp_path / "train.jsonl"), "--semitones", "-2", "0", "2", "2"]
    assert transpose.main([*run, "--out", str(tmp_path / "more.jsonl")]) == 0
    assert "6 items, 0.0 h" in capsys.readouterr().out
    assert [each.id for each in read_manifest(tmp_path / "more.jsonl")] == "a-2 b-2 a b a+2 b+2".split()
    assert np.isfinite(read_manifest(tmp_path / "more.jsonl")[0].read("mix").numpy()).all()
    (tmp_path / "else").mkdir()
    for out in (tmp_path / "else" / "more.jsonl", tmp_path / "train.jsonl"):
        assert transpose.main([*run, "--out", str(out)]) == 1
        assert "--out must be" in capsys.readouterr().err
    assert len(read_manifest(tmp_path / "train.jsonl")) == 2
