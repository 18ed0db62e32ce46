"""Audio shards: what is packed is what streams back, once, in bounded tars."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import PARTS, Item, item_to_line, read_manifest
from duotok.recipes.corpus.shards import is_sung_item, open_items, pack_items, packed_ids, read_shards
from duotok.recipes.tokenizer.cuts import CutConfig, CutSampler
from duotok.tokenizer.common.errors import ConfigError, DataError, DuoTokError

pytest.importorskip("webdataset")


@pytest.fixture(scope="module")
def items(tiny_corpus: Path) -> list[Item]:
    """Seven items of two splits."""
    return [*read_manifest(tiny_corpus / "train.jsonl"), *read_manifest(tiny_corpus / "test.jsonl")]


@pytest.fixture(scope="module")
def tars(items: list[Item], tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The items in tars of at most two items."""
    size = sum(items[0].path(part).stat().st_size for part in ("vocal", "drums", "bass", "other", "mix"))
    return pack_items(items, tmp_path_factory.mktemp("tars"), megabytes=round(2.4 * size / 1e6))


def test_items_stream_back_as_they_are(items: list[Item], tars: list[Path]):
    assert [tar.name for tar in tars] == [f"{s}-{n:06d}.tar" for s in ("train", "test") for n in (0, 1)]
    streamed = list(read_shards(tars))
    assert [item_to_line(item) for item in streamed] == [item_to_line(item) for item in items]
    for item, again in zip(items, streamed, strict=True):
        for part in PARTS:
            for cut in ({}, {"start_seconds": 1.5, "seconds": 0.7, "channels": 1}):
                assert torch.equal(again.read(part, **cut), item.read(part, **cut))  # type: ignore[arg-type]


def test_a_range_of_tars_is_one_url_and_workers_of_a_loader_share_them(items: list[Item], tars: list[Path]):
    streamed = read_shards(f"{tars[0].parent}/train-{{000000..000001}}.tar")
    assert [item.id for item in streamed] == [item.id for item in items if item.split == "train"]
    assert [item.id for item in read_shards(f"{tars[0].parent}/train-*.tar")] == [
        item.id for item in items if item.split == "train"
    ]
    everything = sorted(item.id for item in items)
    assert sorted(item.id for item in read_shards(tars, shuffle=10, seed=1)) == everything

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return (item.id for item in read_shards(tars))

    loading = {"batch_size": None, "num_workers": 2, "multiprocessing_context": "fork"}
    assert sorted(torch.utils.data.DataLoader(Stream(), **loading)) == everything


def test_training_cuts_stream_from_tars(items: list[Item], tars: list[Path]):
    wanted = {item.id for item in items if item.split == "train"}
    source = f"{tars[0].parent}/train-{{000000..000001}}.tar"
    pool = open_items(source, shortest_seconds=1.0, pool_items=2, cuts_per_item=2)
    rng = np.random.default_rng(0)
    drawn = [pool.pick(rng, is_sung=False) for _ in range(40)]
    assert {item.id for item in drawn} == wanted
    assert is_sung_item(pool.pick(rng, is_sung=True))
    sampler = CutSampler(CutConfig(manifest=source, seconds=2.0, pool_items=10))
    cut = sampler.cut(rng, "vocal")
    assert cut.stems.shape == (4, 96_000) and cut.stems[0].any() and not cut.stems[1:].any()


def test_tars_that_cannot_serve_are_named(tars: list[Path]):
    with pytest.raises(DataError, match="no item of at least 500 s"):
        open_items(str(tars[0]), shortest_seconds=500.0, pool_items=2, cuts_per_item=1)
    with pytest.raises(DataError, match="nowhere.tar"):
        open_items(str(tars[0].parent / "nowhere.tar"), shortest_seconds=1.0, pool_items=2, cuts_per_item=1)
    with pytest.raises(ConfigError, match="pool_items"):
        CutConfig(manifest="x", pool_items=0)


def test_packing_again_adds_only_what_is_new(items: list[Item], tmp_path: Path):
    first = pack_items(items[:3], tmp_path)
    assert pack_items(items[:3], tmp_path) == []
    second = pack_items(items[:4], tmp_path)
    assert [tar.name for tar in first + second] == ["train-000000.tar", "train-000001.tar"]
    assert packed_ids(second[0]) == {items[3].id}


def test_damaged_and_missing_tars_are_one_line(items: list[Item], tars: list[Path], tmp_path: Path):
    damaged = tmp_path / "train-000000.tar"
    damaged.write_bytes(tars[0].read_bytes()[:100_000])
    foreign = tmp_path / "foreign.tar"
    with tarfile.open(foreign, "w") as file:
        entry = tarfile.TarInfo("a.txt")
        entry.size = 3
        file.addfile(entry, io.BytesIO(b"abc"))
    for path in (damaged, foreign, tmp_path / "gone.tar"):
        with pytest.raises(DataError, match=path.name) as caught:
            list(read_shards(path))
        assert "\n" not in str(caught.value)
    with pytest.raises(DuoTokError, match="damaged"):
        pack_items(items, tmp_path)
