"""Token shards, training batches and the recipe files of the language model."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from duotok.lm.dual_track.layout import MODES
from duotok.lm.dual_track.model import DualTrackLM, DualTrackLMConfig
from duotok.recipes.corpus.manifest import read_manifest
from duotok.recipes.lm import tokenize, train
from duotok.recipes.lm.tokens import TokenShards, append_shard, read_index, shard_path
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.model import DuoTokenizer

RECIPES = Path(train.__file__).parent
SIZES = {"vocal": 11, "accompaniment": 13}
SHARDING = ["--items-per-shard", "2", "--batch", "2"]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory: pytest.TempPathFactory, small_tokenizer_folder: Path, tiny_corpus: Path) -> Path:
    folder = tmp_path_factory.mktemp("lm_tokens") / "train"
    arguments = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(tiny_corpus / "train.jsonl")]
    assert tokenize.main([*arguments, "--out", str(folder), *SHARDING]) == 0
    return folder


# A run as its programs see it, and the batches its objective is given.
RECORDED_RUN = """
import json, os, sys
from pathlib import Path
import torch
from duotok.recipes.lm import train
from duotok.recipes.training.loop import run_training
from duotok.tokenizer.common.config import load_config
recipe, out, *overrides = sys.argv[1:]
config = load_config(train.Config, recipe, overrides)
task, seen = train.build(config), []
task.objective.register_forward_pre_hook(
    lambda module, args, batch: seen.append(batch["target_vocal"].tolist()), with_kwargs=True
)
run_training(task, config.train, Path(out))
# As the command does: threads of gloo may abort a process that just ends.
torch.distributed.destroy_process_group()
Path(out, f"seen-{os.environ['RANK']}.json").write_text(json.dumps(seen))
"""


def test_tokens_are_the_tokenizer_s(tokens: Path, small_tokenizer_folder: Path, tiny_corpus: Path) -> None:
    shards, tokenizer = TokenShards(tokens), DuoTokenizer.from_pretrained(small_tokenizer_folder)
    items = {item.id: item for item in read_manifest(tiny_corpus / "train.jsonl")}
    assert {song.id for song in shards.index.songs} == set(items)
    assert shards.index.tokenizer_fingerprint == tokenizer.fingerprint
    assert shards.index.codebook_sizes == SIZES
    song = shards.index.songs[-1]
    assert (song.split, song.song, song.frames) == ("train", items[song.id].song, 200)
    for track, codes in shards.codes(song).items():
        assert torch.equal(codes, tokenizer.encode(items[song.id].read(track)[None], track)[0])


def test_tokenizing_again_goes_on(tokens: Path, small_tokenizer_folder: Path, tiny_corpus: Path) -> None:
    arguments = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(tiny_corpus / "train.jsonl")]
    before = (tokens / "index.json").read_text()
    assert tokenize.main([*arguments, "--out", str(tokens), *SHARDING]) == 0
    assert (tokens / "index.json").read_text() == before
    # An interruption after the first shard: the rest is made again, the first is kept.
    index = json.loads(before)
    index["songs"] = [song for song in index["songs"] if song["shard"] == 0]
    (tokens / "index.json").write_text(json.dumps(index))
    assert tokenize.main([*arguments, "--out", str(tokens), *SHARDING]) == 0
    assert (tokens / "index.json").read_text() == before


def test_tokens_of_another_tokenizer_are_refused(
    tmp_path: Path,
    small_tokenizer_folder: Path,
    tiny_corpus: Path,
    capsys: pytest.CaptureFixture[str],
    make_shards,
) -> None:
    make_shards(tmp_path / "tokens")
    arguments = ["--tokenizer", str(small_tokenizer_folder), "--manifest", str(tiny_corpus / "train.jsonl")]
    assert tokenize.main([*arguments, "--out", str(tmp_path / "tokens")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and "give another --out folder" in error


def test_shards(tmp_path: Path, make_shards) -> None:
    shards = make_shards(tmp_path)
    assert [(s.shard, s.start, s.frames) for s in shards.index.songs] == [(0, 0, 30), (0, 30, 60), (1, 0, 90)]
    whole = shards.codes(shards.index.songs[1])
    part = shards.codes(shards.index.songs[1], 50, 20)
    assert len(part["vocal"]) == 10
    assert torch.equal(part["accompaniment"], whole["accompaniment"][50:])
    with pytest.raises(DataError, match="run python -m duotok.recipes.lm.tokenize"):
        TokenShards(tmp_path / "nothing")
    (tmp_path / "index.json").write_text("{}")
    with pytest.raises(DataError, match="damaged"):
        read_index(tmp_path)


def test_two_processes_draw_different_batches_from_the_same_shard(
    tmp_path: Path, tokens: Path, small_tokenizer_folder: Path
) -> None:
    index = read_index(tokens)
    assert index is not None
    alone = tmp_path / "tokens"  # fewer shards than processes
    pairs = {s.id: (s.song, s.split, TokenShards(tokens).codes(s)) for s in index.songs}
    index.songs.clear()
    append_shard(alone, index, pairs)
    command = [sys.executable, "-c", RECORDED_RUN, str(RECIPES / "tiny.yaml"), str(tmp_path / "run")]
    command += [f"tokenizer={small_tokenizer_folder}", f"data.tokens={alone}", "train.steps=3"]
    command += ["data.windows=[[1.0, 1]]"]
    variables = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29617"}
    variables |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    started = [
        subprocess.Popen(command, env={**os.environ, **variables, "RANK": str(n), "LOCAL_RANK": str(n)})
        for n in range(2)
    ]
    assert [process.wait(timeout=300) for process in started] == [0, 0]
    first, second = (json.loads((tmp_path / "run" / f"seen-{n}.json").read_text()) for n in range(2))
    assert len(first) == len(second) == 3
    assert all(one != two for one, two in zip(first, second, strict=True))


def test_shards_that_do_not_fit_their_index_are_named(tmp_path: Path, make_shards) -> None:
    def damage(name: str, change) -> Path:
        make_shards(tmp_path / name)
        index = json.loads((tmp_path / name / "index.json").read_text())
        change(tmp_path / name, index)
        (tmp_path / name / "index.json").write_text(json.dumps(index))
        return tmp_path / name

    def cut(folder: Path, index: dict) -> None:
        path = shard_path(folder, 1)
        path.write_bytes(path.read_bytes()[:-8])

    def lose(folder: Path, index: dict) -> None:
        shard_path(folder, 0).unlink()

    def lengthen(folder: Path, index: dict) -> None:
        index["songs"][1]["frames"] = 61

    def shrink_codebook(folder: Path, index: dict) -> None:
        index["codebook_sizes"]["accompaniment"] = 8

    def misplace(folder: Path, index: dict) -> None:
        index["songs"][0]["start"] = -1

    for change, message in (
        (cut, "tokens-00001.safetensors is missing or damaged"),
        (lose, "tokens-00000.safetensors is missing or damaged"),
        (lengthen, "holds 90 frames, index.json names 91"),
        (misplace, "index.json is damaged"),
    ):
        with pytest.raises(DataError, match=message):
            TokenShards(damage(change.__name__, change))
    shards = TokenShards(damage("codes", shrink_codebook))
    with pytest.raises(DataError, match=r"accompaniment codes 0\.\.12, index.json says 0\.\.7"):
        shards.codes(shards.index.songs[0])
    (tmp_path / "cut" / "index.json").unlink()
    with pytest.raises(DataError, match="no index.json"):
        TokenShards(tmp_path / "cut")


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_recipe_files_load(size: str) -> None:
    config = load_config(train.Config, RECIPES / f"{size}.yaml")
    assert config.data.vocal_to_accompaniment > 0
    # Where training is long it is watched, on songs that it never sees.
    assert size == "tiny" or (config.data.hold_out > 0 and config.train.validate_every > 0)


def test_the_sizes_are_what_their_files_say() -> None:
    small = load_config(train.Config, RECIPES / "small.yaml").model
    base = load_config(train.Config, RECIPES / "base.yaml").model
    sizes = dict(vocal_codes=1024, accompaniment_codes=2048)
    with torch.device("meta"):
        small_model = DualTrackLM(DualTrackLMConfig(**{**vars(small), **sizes}))
        base_model = DualTrackLM(base)
    assert 4e6 < sum(p.numel() for p in small_model.parameters()) < 12e6
    assert 0.9e9 < sum(p.numel() for p in base_model.parameters()) < 1.1e9


def test_the_tiny_recipe_trains(tmp_path: Path, tokens: Path, small_tokenizer_folder: Path) -> None:
    command = [str(RECIPES / "tiny.yaml"), "--out", str(tmp_path / "run"), "--set", "train.steps=3"]
    command += ["--set", f"tokenizer={small_tokenizer_folder}", "--set", f"data.tokens={tokens}"]
    watched = ["data.hold_out=0.5", "validation.prefix_seconds=0.4", "train.validate_every=2"]
    assert train.main([*command, *(part for each in watched for part in ("--set", each))]) == 0
    rows = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if "validation/cnbpt/unconditional_vocal" in row]
    assert row["step"] == 2 and 0.5 < row["validation/cnbpt/vocal_to_accompaniment"] < 2
    assert row["tokens_per_second"] > 0 and math.isfinite(row["mfu"]) and row["mfu"] > 0
    tasks = [name for row in rows for name in row if name.startswith(("vocal_nats/", "accompaniment_nats/"))]
    assert tasks and {task.split("/")[1] for task in tasks} <= set(MODES)
    lm = DualTrackLM.from_pretrained(tmp_path / "run" / "final")
    assert lm.tokenizer_fingerprint == TokenShards(tokens).index.tokenizer_fingerprint
    assert lm.config.accompaniment_codes == 13
    # Go on from it with other settings.
    command = [*command[:1], "--out", str(tmp_path / "more"), *command[3:]]
    assert train.main([*command, "--set", f"start_from={tmp_path / 'run' / 'final'}"]) == 0


def test_a_model_of_another_tokenizer_is_refused(
    tmp_path: Path, small_tokenizer_folder: Path, capsys: pytest.CaptureFixture[str], make_shards
) -> None:
    make_shards(tmp_path / "tokens")
    command = [str(RECIPES / "tiny.yaml"), "--out", str(tmp_path / "run")]
    command += ["--set", f"tokenizer={small_tokenizer_folder}", "--set", f"data.tokens={tmp_path / 'tokens'}"]
    assert train.main(command) == 1
    assert "make the tokens again" in capsys.readouterr().err
