"""Token shards of a corpus: by several processes, on several machines, with bad items, interrupted."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.lm import tokenize
from duotok.recipes.lm.tokens import TokenShards
from duotok.tokenizer.common.audio import write_audio

Run = Callable[..., int]


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """Seven items, of which the first three are one song."""
    path = tmp_path_factory.mktemp("manifest") / "train.jsonl"
    items = [*read_manifest(tiny_corpus / "train.jsonl"), *read_manifest(tiny_corpus / "test.jsonl")]
    named = [
        dataclasses.replace(
            item,
            song="one" if number < 3 else item.song,
            stems={stem: str(item.path(stem)) for stem in item.stems},
            mix=str(item.path("mix")),
        )
        for number, item in enumerate(items)
    ]
    write_manifest(path, named)
    return path


@pytest.fixture(scope="module")
def run(small_tokenizer_folder: Path, manifest: Path) -> Run:
    def start(out: Path, *options: str, manifest: Path = manifest) -> int:
        command = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(manifest), "--out", str(out)]
        return tokenize.main([*command, "--batch", "2", "--items-per-shard", "2", *options])

    return start


@pytest.fixture(scope="module")
def whole(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process writes in one go."""
    out = tmp_path_factory.mktemp("whole") / "tokens"
    assert run(out) == 0
    return out


def codes_of(folder: Path) -> dict[str, dict[str, list[int]]]:
    shards = TokenShards(folder)
    return {
        song.id: {track: codes.tolist() for track, codes in shards.codes(song).items()}
        for song in shards.index.songs
    }


def test_several_processes_write_what_one_writes(run: Run, whole: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "tokens", "--workers", "2") == 0
    assert sorted(path.name for path in (tmp_path / "tokens").iterdir()) == sorted(
        path.name for path in whole.iterdir()
    )
    assert (tmp_path / "tokens" / "index.json").read_text() == (whole / "index.json").read_text()
    for path in whole.glob("*.safetensors"):
        one, two = load_file(path), load_file(tmp_path / "tokens" / path.name)
        assert all(torch.equal(one[track], two[track]) for track in ("vocal", "accompaniment"))


def test_bad_items_are_listed_and_the_others_are_encoded(
    run: Run, whole: Path, manifest: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    items = read_manifest(manifest)
    short, long = tmp_path / "short.wav", tmp_path / "long.wav"
    write_audio(short, torch.rand(2, 48_000))
    write_audio(long, torch.rand(2, 2 * 48_000))
    damaged = tmp_path / "damaged.wav"
    damaged.write_bytes(b"RIFF nothing")
    bad = {
        items[1].id: {"vocal": str(tmp_path / "lost.wav")},
        items[3].id: {"drums": str(short)},  # its other stems are longer: they cannot be added
        items[4].id: {"bass": str(damaged)},
        items[5].id: {"vocal": str(long)},
    }
    spoilt = tmp_path / "train.jsonl"
    changed = [dataclasses.replace(i, stems={**i.stems, **bad.get(i.id, {})}) for i in items]
    write_manifest(spoilt, changed)
    out = tmp_path / "tokens"
    assert run(out, manifest=spoilt) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: 3 items are in") and "4 were left out" in last and "and 1 more" in last
    lines = [json.loads(line) for line in (out / "left_out.jsonl").read_text().splitlines()]
    reasons = {line["id"]: line["reason"] for line in lines}
    assert set(reasons) == set(bad)
    assert "lost.wav" in reasons[items[1].id] and "damaged.wav" in reasons[items[4].id]
    assert "frames" in reasons[items[5].id]
    expected = codes_of(whole)
    assert codes_of(out) == {name: codes for name, codes in expected.items() if name not in bad}
    # Mended: only those are encoded, and nothing is left out any more.
    assert run(out) == 0
    assert codes_of(out) == expected and not (out / "left_out.jsonl").exists()


@pytest.mark.parametrize(
    "options",
    [("--batch", "0"), ("--threads", "0"), ("--ray",)],
)
def test_bad_options_are_usage_errors(run: Run, tmp_path: Path, options: tuple[str, str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run(tmp_path, *options)
    assert exit_info.value.code == 2


def test_a_full_disk_is_one_line(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")  # no folder can be made in it
    assert run(tmp_path / "file" / "tokens") == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error: cannot write")]
