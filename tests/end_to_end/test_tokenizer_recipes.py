"""Stages 1 to 3 at size tiny on a synthetic corpus: the loss falls, and an interrupted run ends the same."""

import json
from pathlib import Path

import pytest
import torch

from duotok.recipes.tokenizer import stage1, stage2, stage3
from duotok.recipes.tokenizer import train_separator as separator
from duotok.recipes.tokenizer import train_text_model as text
from duotok.recipes.training.loop import run_training
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.separator import MaskSeparator

RECIPES = Path(stage1.__file__).parent


@pytest.fixture(scope="module")
def runs(tiny_corpus, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    manifest = ["--manifest", str(tiny_corpus / "train.jsonl")]
    assert text.main([*manifest, "--out", str(out / "text.model"), "--pieces", "8"]) == 0
    for number, stage in enumerate((stage1, stage2, stage3), start=1):
        assert stage.main(command(number, tiny_corpus, out)) == 0
    return out


def command(number: int, corpus: Path, out: Path) -> list[str]:
    arguments = [str(RECIPES / f"stage{number}" / "tiny.yaml"), "--out", str(out / f"stage{number}")]
    arguments += ["--set", f"data.manifest={corpus / 'train.jsonl'}"]
    if number == 2:
        arguments += ["--set", f"text={out / 'text.model'}"]
    if number > 1:
        arguments += ["--set", f"start_from={out / f'stage{number - 1}' / 'final'}"]
    return arguments


@pytest.mark.parametrize("number", [1, 2, 3])
def test_loss_falls(runs, number):
    rows = [json.loads(line) for line in (runs / f"stage{number}" / "log.jsonl").read_text().splitlines()]
    losses = [row["total"] for row in rows]
    assert sum(losses[-4:]) < 0.97 * sum(losses[:4])


def test_every_loss_is_logged_by_kind(runs):
    rows = [json.loads(line) for line in (runs / "stage2" / "log.jsonl").read_text().splitlines()]
    names = set().union(*rows)
    for loss in ("mel", "chroma", "masks"):
        assert {loss, *(f"{loss}/{k}" for k in ("mix", "vocal", "accompaniment", "instrumental"))} <= names
    assert {"text", "text/vocal"} <= names and "text/mix" not in names
    third = set(json.loads((runs / "stage3" / "log.jsonl").read_text().splitlines()[0]))
    assert {"text/vocal", "mel/vocal", "vocal_commitment", "accompaniment_usage"} <= third
    assert not any(name.startswith("masks") for name in third)


def test_heads_of_the_stages(runs):
    second, third = (DuoTokenizer.from_pretrained(runs / f"stage{n}" / "final") for n in (2, 3))
    assert second.mask_head is not None and third.mask_head is None
    assert second.text is not None and third.text is not None
    assert third.config.text_tokens == third.text.size + 1
    told = third.read_text(torch.zeros(2, 10, dtype=torch.int64), "vocal")
    assert len(told) == 2 and all(isinstance(line, str) for line in told)


def test_the_separator_learns_on_the_frozen_stage_2(runs, tiny_corpus, tmp_path):
    arguments = [str(RECIPES / "train_separator" / "tiny.yaml"), "--out", str(tmp_path)]
    arguments += ["--set", f"data.manifest={tiny_corpus / 'train.jsonl'}"]
    assert separator.main([*arguments, "--set", f"start_from={runs / 'stage2' / 'final'}"]) == 0
    losses = [json.loads(line)["total"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    trained = MaskSeparator.from_pretrained(tmp_path / "final").tokenizer.state_dict()
    before = DuoTokenizer.from_pretrained(runs / "stage2" / "final").state_dict()
    assert all(torch.equal(before[name], trained[name]) for name in before)
    assert separator.main([*arguments, "--set", f"start_from={runs / 'stage3' / 'final'}"]) == 1


def test_stage3_keeps_the_encoder_and_moves_the_codebooks(runs):
    before = DuoTokenizer.from_pretrained(runs / "stage2" / "final").state_dict()
    after = DuoTokenizer.from_pretrained(runs / "stage3" / "final").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(
        before["tracks.vocal.quantizer.map.weight"], after["tracks.vocal.quantizer.map.weight"]
    )


def test_stage3_resumes_exactly(runs, tiny_corpus, tmp_path):
    overrides = [f"data.manifest={tiny_corpus / 'train.jsonl'}", f"start_from={runs / 'stage2' / 'final'}"]
    config = load_config(stage3.Config, RECIPES / "stage3" / "tiny.yaml", overrides)
    run_training(stage3.build(config), config.train, tmp_path, stop_after=7)
    run_training(stage3.build(config), config.train, tmp_path)
    whole = (runs / "stage3" / "final" / "model.safetensors").read_bytes()
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == whole


def test_missing_manifest_is_one_line(capsys, runs, tmp_path):
    assert stage1.main(command(1, tmp_path / "nowhere", tmp_path)) == 1
    message = capsys.readouterr().err.strip()
    assert "nowhere" in message and "\n" not in message
