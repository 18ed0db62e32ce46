"""The command that trains the language model, on input that cannot be used: one line and exit code 1.

Fewer shards than processes is none of it: every process may read every shard (test_lm_data.py).
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.lm import train
from duotok.recipes.lm.tokens import TokenIndex, append_shard, shard_path
from duotok.tokenizer.model import DuoTokenizer

TINY = str(Path(train.__file__).parent / "tiny.yaml")
SIZES = {"vocal": 11, "accompaniment": 13}


@pytest.fixture
def folders(tmp_path: Path, make_small_tokenizer: Callable[..., DuoTokenizer]) -> dict[str, Path]:
    """A tokenizer with random weights, and one shard of two songs."""
    tokenizer = make_small_tokenizer(tmp_path / "tokenizer")
    index = TokenIndex(
        tokenizer_fingerprint=str(tokenizer.fingerprint), codebook_sizes=SIZES, frame_rate_hz=25.0
    )
    rng = np.random.default_rng(0)
    codes = {track: torch.from_numpy(rng.integers(size, size=100)) for track, size in SIZES.items()}
    append_shard(tmp_path / "tokens", index, {f"item{n}": (f"song{n}", "train", codes) for n in range(2)})
    return {name: tmp_path / name for name in ("tokenizer", "tokens", "run")}


def start(folders: dict[str, Path], *changes: str, deepspeed: Path | None = None) -> int:
    overrides = [f"tokenizer={folders['tokenizer']}", f"data.tokens={folders['tokens']}", "train.steps=4"]
    overrides += ["train.log_every=1", "train.checkpoint_minutes=0", *changes]
    command = [TINY, "--out", str(folders["run"]), *(part for each in overrides for part in ("--set", each))]
    return train.main(command if deepspeed is None else [*command, "--deepspeed", str(deepspeed)])


def told(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line of the error; a progress bar may stand before it."""
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_shards_of_another_tokenizer(folders, capsys):
    index = json.loads((folders["tokens"] / "index.json").read_text())
    (folders["tokens"] / "index.json").write_text(json.dumps({**index, "tokenizer_fingerprint": "other"}))
    assert start(folders) == 1
    assert "were made by the tokenizer other" in told(capsys)


def test_a_truncated_shard(folders, capsys):
    path = shard_path(folders["tokens"], 0)
    path.write_bytes(path.read_bytes()[:-8])
    assert start(folders) == 1
    assert f"{path} is missing or damaged; make the tokens again" in told(capsys)


def test_a_deepspeed_config_that_contradicts_the_recipe(folders, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 2}, "train_micro_batch_size_per_gpu": 3}))
    assert start(folders, deepspeed=path) == 1
    assert "train_micro_batch_size_per_gpu is 3, train.batch_size is 8" in told(capsys)


def test_a_checkpoint_of_another_number_of_processes(folders, capsys):
    assert start(folders) == 0
    path = folders["run"] / "checkpoint" / "state.json"
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, "processes": 3}))
    capsys.readouterr()
    assert start(folders, "train.steps=6") == 1
    assert "is of 3 processes, this run has 1; start with as many" in told(capsys)
    path.write_text("[]")
    capsys.readouterr()
    assert start(folders, "train.steps=6") == 1
    assert "is damaged" in told(capsys)


def test_a_loss_that_is_not_finite(folders, capsys):
    assert start(folders, "train.steps=2") == 0
    capsys.readouterr()
    wild = ["train.learning_rate=1e30", "train.gradient_clip=1e30", "train.warmup_steps=0"]
    assert start(folders, "train.steps=8", *wild) == 1
    line = told(capsys)
    assert "is not finite at step" in line and "np.random.default_rng((0, " in line
    assert f"the last good checkpoint is {folders['run'] / 'checkpoint'}, of step" in line
    state = json.loads((folders["run"] / "checkpoint" / "state.json").read_text())
    assert f"of step {state['step']}" in line and state["step"] < 8


def test_out_of_memory(folders, capsys, monkeypatch):
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr("duotok.lm.dual_track.model.DualTrackLM.hidden_states", fail)
    assert start(folders) == 1
    line = told(capsys)
    assert "out of memory at step 1; there is no checkpoint yet; lower train.batch_size (8)" in line
    assert "model.gradient_checkpointing=true" in line
