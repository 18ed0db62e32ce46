"""Audio shards: what is packed is read back in mono, in bounded tars; training goes on from them exactly."""

import io
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import Item, item_to_line, read_manifest
from duotok.recipes.corpus.shards import (
    find_tars,
    is_sung_item,
    open_items,
    pack_items,
    packed_ids,
    read_shards,
)
from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.recipes.training.batches import open_batches
from duotok.recipes.training.task import Task, TrainConfig
from duotok.recipes.workers.pool import Workers
from duotok.tokenizer.common.errors import AudioError, ConfigError, DataError
from duotok.tokenizer.heads import STEMS


@pytest.fixture(scope="module")
def items(tiny_corpus: Path) -> list[Item]:
    """Seven items of two splits."""
    return [*read_manifest(tiny_corpus / "train.jsonl"), *read_manifest(tiny_corpus / "test.jsonl")]


@pytest.fixture(scope="module")
def tars(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The items in tars of at most two items of 3.1 MB each."""
    return pack_items(items, tmp_path_factory.mktemp("tars"), megabytes=7)


def test_stems_stream_back_in_mono(items: list[Item], tars: list[Path]):
    assert [tar.name for tar in tars] == [f"{s}-{n:06d}.tar" for s in ("train", "test") for n in (0, 1)]
    streamed = [item for tar in tars for item in read_shards(tar)]
    assert [item_to_line(item) for item in streamed] == [item_to_line(item) for item in items]
    for item, again in zip(items, streamed, strict=True):
        for part in (*STEMS, "accompaniment"):
            for cut in ({}, {"start_seconds": 1.5, "seconds": 0.7}, {"start_seconds": 7.9, "seconds": 1.0}):
                wave = item.read(part, channels=1, **cut)  # type: ignore[arg-type]
                steps = (again.read(part, channels=1, **cut) - wave) * 32_768  # type: ignore[arg-type]
                assert float(steps.abs().max()) <= (1.5 if part == "accompaniment" else 0.5)
        assert torch.equal(again.read("drums"), again.read("drums", channels=1).repeat(2, 1))
        with pytest.raises(DataError, match=f"holds no mix of item {item.id}; read it by the manifest"):
            again.read("mix")
        with pytest.raises(AudioError, match=f"vocal of item {item.id} has no samples, .* from 8 s on"):
            again.read("vocal", start_seconds=8.0)


def test_a_range_of_tars_is_one_name(items: list[Item], tars: list[Path]):
    folder = tars[0].parent
    trained = [item.id for item in items if item.split == "train"]
    assert [item.id for item in read_shards(f"{folder}/train-{{000000..000001}}.tar")] == trained
    assert [item.id for item in read_shards(f"file://{folder}/train-*.tar")] == trained
    assert find_tars("s3://b/{00..01}-{8..10}.tar") == [
        f"s3://b/{a}-{b}.tar" for a in ("00", "01") for b in (8, 9, 10)
    ]


def pack_singly(items: list[Item], folder: Path) -> Path:
    """Each item in a tar of its own."""
    pack_items(items, folder, megabytes=1)
    return folder


def make_task(source: str, **settings) -> Task:
    """Batches of two cuts, with a trace of where they are from."""
    sampler = CutSampler(CutConfig(manifest=source, seconds=0.5, **settings))
    return Task(
        torch.nn.Identity(),
        lambda rng: {"wave": sampler.draw(rng, ["mix", "vocal"])},
        lambda folder: None,
        seek=sampler.seek,
    )


def draw_steps(task: Task, steps: range, *, workers: int = 0, process: int = 0) -> list[torch.Tensor]:
    """The batches of some steps."""
    config, device = TrainConfig(workers=workers, accumulate=2, seed=3), torch.device("cpu")
    with open_batches(task, config, process=process, first_step=steps.start, device=device) as batches:
        return [next(batches).tensors["wave"] for _ in range(2 * len(steps))]


def test_training_goes_on_from_tars_with_the_same_batches(items: list[Item], tmp_path: Path):
    """Where it stops, by how many workers, and what was drawn before, are nothing to the batches."""
    source = f"{pack_singly(items, tmp_path)}/*.tar"
    settings = {"tars": 2, "steps_per_tar": 2}
    whole = draw_steps(make_task(source, **settings), range(12))
    task = make_task(source, **settings)
    draw_steps(task, range(3), process=1)
    for workers in (0, 2):
        again = draw_steps(task, range(5, 12), workers=workers)
        assert all(torch.equal(one, two) for one, two in zip(whole[10:], again, strict=True))
    assert not torch.equal(whole[10], draw_steps(task, range(5, 6), process=1)[0])


def test_a_process_draws_of_some_tars_at_a_time_and_of_all_in_turn(items: list[Item], tmp_path: Path):
    tars = {item.id: item.tar for item in read_shards(f"{pack_singly(items, tmp_path)}/*.tar")}
    settings = {"tars": 3, "steps_per_tar": 2, "cache": tmp_path, "cache_gb": 1.0}
    source = open_items(f"{tmp_path}/*.tar", shortest_seconds=1.0, **settings)
    drawn = []
    for step in range(2 * len(tars)):
        source.seek(0, 0, step)
        rng = np.random.default_rng(step)
        drawn.append({tars[source.pick(rng, is_sung=False).id] for _ in range(40)})
        assert is_sung_item(source.pick(rng, is_sung=True))
    assert {len(each) for each in drawn[:10]} == {3}
    assert set.union(*drawn) == set(tars.values())
    assert drawn[0] == drawn[1] and len(drawn[2] - drawn[1]) == 1


def test_tars_that_cannot_serve_are_named(tars: list[Path], tmp_path: Path):
    settings = {"tars": 2, "steps_per_tar": 1, "cache": tmp_path, "cache_gb": 1.0}
    with pytest.raises(DataError, match="no item of at least 500 s"):
        open_items(str(tars[0]), shortest_seconds=500.0, **settings)
    with pytest.raises(DataError, match="nowhere.tar"):
        open_items(str(tars[0].parent / "nowhere.tar"), shortest_seconds=1.0, **settings)
    with pytest.raises(DataError, match="there are no tars"):
        open_items(str(tars[0].parent / "nowhere*.tar"), shortest_seconds=1.0, **settings)
    with pytest.raises(ConfigError, match="steps_per_tar"):
        CutConfig(manifest="x", steps_per_tar=0)


def test_packing_again_adds_only_what_is_new(items: list[Item], tmp_path: Path):
    first = pack_items(items[:3], tmp_path)
    assert pack_items(items[:3], tmp_path) == []
    second = pack_items(items[:4], tmp_path)
    assert [tar.name for tar in first + second] == ["train-000000.tar", "train-000001.tar"]
    assert packed_ids(second[0]) == {items[3].id}


def test_damaged_and_missing_tars_are_one_line(items: list[Item], tars: list[Path], tmp_path: Path):
    damaged = tmp_path / "train-000000.tar"
    damaged.write_bytes(tars[0].read_bytes()[:100_000])
    between = tmp_path / "between.tar"  # is cut off where an item ends
    with tarfile.open(tars[0]) as file:
        between.write_bytes(tars[0].read_bytes()[: file.getmembers()[5].offset])
    foreign, earlier = tmp_path / "foreign.tar", tmp_path / "earlier.tar"
    for path, names in ((foreign, ["a.txt"]), (earlier, ["a.vocal.flac", "a.json"])):
        with tarfile.open(path, "w") as file:
            for name in names:
                entry = tarfile.TarInfo(name)
                entry.size = 3
                file.addfile(entry, io.BytesIO(b"abc"))
    for path in (damaged, between, foreign, earlier, tmp_path / "gone.tar"):
        with pytest.raises(DataError, match=path.name) as caught:
            list(read_shards(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match="damaged .*; delete it and pack again"):
        pack_items(items, tmp_path)
    data = bytearray(tars[0].read_bytes())
    data[data.index(b"fmt ") + 10] = 2  # channels
    damaged.write_bytes(data)
    for told in ("has no samples, 48 kHz and mono", "is damaged; pack it again"):
        with pytest.raises(AudioError, match=f"vocal of item train-0.*{told}"):
            next(iter(read_shards(damaged))).read("vocal")
        data[data.index(b"fmt ") + 8] = 9  # no PCM
        damaged.write_bytes(data)
    data = bytearray(tars[0].read_bytes())
    first = data.index(b"data") + 4
    data[first : first + 4] = (2**28).to_bytes(4, "little")  # reaches into what follows
    damaged.write_bytes(data)
    with pytest.raises(AudioError, match="has no samples, 48 kHz and mono"):
        next(iter(read_shards(damaged))).read("vocal")


def test_an_item_that_cannot_be_read_does_not_stop_the_rest(items: list[Item], tmp_path: Path):
    spoilt = [replace(item, mix="no", stems={**item.stems, "bass": "no.wav"}) for item in items[1:3]]
    mended = [items[0], spoilt[0], *items[4:], spoilt[1]]
    with pytest.raises(DataError, match=r"2 items or tars could not be packed: train-1: .*no\.wav") as caught:
        pack_items(mended, tmp_path, megabytes=4, workers=Workers(count=2))
    assert "\n" not in str(caught.value)
    again = sorted(path.name for path in tmp_path.iterdir())
    assert again == [f"{name}.tar" for name in ("test-000000", "test-000001", "test-000002", "train-000000")]
    pack_items(items, tmp_path)
    assert sorted(item.id for item in read_shards(f"{tmp_path}/*.tar")) == sorted(item.id for item in items)


def test_items_that_are_there_twice_are_named(items: list[Item], tmp_path: Path):
    with pytest.raises(DataError, match="two items called 'train-0'"):
        pack_items([items[0], items[1], items[0]], tmp_path)
