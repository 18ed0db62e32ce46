"""Every recipe at size tiny on synthetic songs: stages 1 to 3 learn, an interrupted run ends the same."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch

from duotok.lm.sheet.reader import SheetReader, SheetReaderConfig
from duotok.recipes.lm import tokenize, train_sheet_reader
from duotok.recipes.lm import train as lm_train
from duotok.recipes.lm.accompgen import fit_semantic, layered_tokens, train_stage
from duotok.recipes.lm.separator import train_token_separator
from duotok.recipes.renderer import (
    latents,
    train_acoustic_codec,
    train_diffusion,
    train_spectral_vae,
    train_waveform_vae,
)
from duotok.recipes.tokenizer import (
    stage1,
    stage2,
    stage3,
    train_harmony_reader,
    train_separator,
    train_text_model,
)
from duotok.recipes.training.log import read_log
from duotok.recipes.training.loop import run_training, train_recipe
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.model import DuoTokenizer
from duotok.tokenizer.separator import MaskSeparator

ROOT = Path(__file__).parents[2]
RECIPES = ROOT / "recipes" / "tokenizer"


@pytest.fixture(scope="module")
def runs(tiny_corpus, tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    out = tmp_path_factory.mktemp("runs")
    manifest = ["--manifest", str(tiny_corpus / "train.jsonl")]
    assert train_text_model.main([*manifest, "--out", str(out / "text.model"), "--pieces", "8"]) == 0
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
    assert train_separator.main([*arguments, "--set", f"start_from={runs / 'stage2' / 'final'}"]) == 0
    losses = [json.loads(line)["total"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    trained = MaskSeparator.from_pretrained(tmp_path / "final").tokenizer.state_dict()
    before = DuoTokenizer.from_pretrained(runs / "stage2" / "final").state_dict()
    assert all(torch.equal(before[name], trained[name]) for name in before)
    assert train_separator.main([*arguments, "--set", f"start_from={runs / 'stage3' / 'final'}"]) == 1


def test_stage3_keeps_the_encoder_and_moves_the_codebooks(runs):
    before = DuoTokenizer.from_pretrained(runs / "stage2" / "final").state_dict()
    after = DuoTokenizer.from_pretrained(runs / "stage3" / "final").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if name.startswith("encoder."))
    assert not torch.equal(
        before["tracks.vocal.quantizer.map.weight"], after["tracks.vocal.quantizer.map.weight"]
    )


@pytest.fixture(scope="module")
def parts(runs, tiny_corpus, tiny_components, tiny_codec, tmp_path_factory) -> dict[str, Path]:
    """What recipes start from, by name: components, and what their commands made of the corpus."""
    made = tmp_path_factory.mktemp("parts")
    manifest, folder = tiny_corpus / "train.jsonl", str(tiny_components["tokenizer"])
    common = ["--tokenizer", folder, "--manifest", str(manifest), "--out"]
    assert tokenize.main([*common, str(made / "tokens")]) == 0
    assert latents.main([*common, str(made / "latents"), "--vae", str(tiny_components["vae"])]) == 0
    tokenizer = DuoTokenizer.from_pretrained(folder)
    SheetReader.for_tokenizer(tokenizer, SheetReaderConfig(dim=8, dilations=(1, 2))).save_pretrained(
        made / "reader"
    )
    options = ["--encoder", folder, "--clusters", "8", "--frames", "1000", "--manifest", str(manifest)]
    assert fit_semantic.main([*options, "--out", str(made / "semantic")]) == 0
    options = ["--semantic", str(made / "semantic"), "--codec", str(tiny_codec), "--manifest", str(manifest)]
    assert layered_tokens.main([*options, "--out", str(made / "layered")]) == 0
    names = {name: made / name for name in ("tokens", "latents", "reader", "layered", "semantic")}
    names["codec"] = tiny_codec
    names |= {name: runs / name / "final" for name in ("stage1", "stage2")}
    names |= {"manifest": manifest, "tokenizer": Path(folder), "vae": tiny_components["vae"]}
    return names | {"text": runs / "text.model"}


HEARD = "data.manifest={manifest}"
SPOKEN = ("tokenizer={tokenizer}", "data.tokens={tokens}")
RECIPES_AND_SETTINGS = {
    "tokenizer/stage1/tiny": (stage1, HEARD),
    "tokenizer/stage2/tiny": (stage2, HEARD, "start_from={stage1}", "text={text}"),
    "tokenizer/stage3/tiny": (stage3, HEARD, "start_from={stage2}", "start_cuts=4"),
    "tokenizer/train_separator/tiny": (train_separator, HEARD, "start_from={stage2}", "train.batch_size=1"),
    "tokenizer/train_harmony_reader/tiny": (
        train_harmony_reader,
        HEARD,
        "data.tokenizer={tokenizer}",
        SPOKEN[1],
    ),
    "lm/train_sheet_reader/small": (
        (
            train_sheet_reader,
            HEARD,
            *SPOKEN,
            "data.hold_out=0",
            "data.seconds=[[2.0,1]]",
            "train.batch_size=2",
        )
        + ("model={dim: 8, dilations: [1, 2], dropout: 0.2}",)
    ),
    "lm/tiny": (lm_train, *SPOKEN, "sheets.reader={reader}", "sheets.manifest={manifest}"),
    "lm/accompgen/tiny": (train_stage, "data.tokens={layered}", "stage=coarse", "model.dropout=0.1"),
    "lm/separator/tiny": (train_token_separator, HEARD, "codec={codec}", "semantic={semantic}")
    + ("features={semantic}", "model.dropout=0.1", "train.ema_decay=0.9"),
    "renderer/train_spectral_vae/tiny": (train_spectral_vae, HEARD),
    "renderer/train_waveform_vae/tiny": (train_waveform_vae, HEARD),
    "renderer/train_diffusion/tiny": (train_diffusion, "tokenizer={tokenizer}", "data.latents={latents}")
    + ("model.latent_dim=8", "train.ema_decay=0.9"),
    "renderer/train_acoustic_codec/tiny": (train_acoustic_codec, "vae={vae}", "data.latents=[{latents}]"),
}


@pytest.mark.parametrize("name", RECIPES_AND_SETTINGS)
def test_an_interrupted_run_ends_with_the_weights_of_an_uninterrupted_one(name, parts, tmp_path):
    recipe, *settings = RECIPES_AND_SETTINGS[name]
    # The paths only: settings have braces of their own.
    overrides = [re.sub(r"\{(\w+)\}", lambda found: str(parts[found[1]]), each) for each in settings]
    overrides += ["train.steps=5", "train.accumulate=2", "train.precision=fp32", "train.log_every=1"]
    config = load_config(recipe.Config, ROOT / "recipes" / f"{name}.yaml", overrides)
    torch.manual_seed(1)  # of what ran before in this process
    train_recipe(recipe.build, config, tmp_path / "whole")
    torch.manual_seed(2)
    train_recipe(recipe.build, config, tmp_path / "pieces", stop_after=2)
    torch.manual_seed(3)
    # Not seeded: all that matters comes from the checkpoint.
    run_training(recipe.build(config), config.train, tmp_path / "pieces")
    for file in ("checkpoint/weights", "checkpoint/optimizer", "final/model"):
        whole, pieces = (tmp_path / run / f"{file}.safetensors" for run in ("whole", "pieces"))
        assert whole.read_bytes() == pieces.read_bytes(), file
    losses = [{row["step"]: row["total"] for row in read_log(tmp_path / run)} for run in ("whole", "pieces")]
    assert losses[0] == losses[1] and len(set(losses[0].values())) == 5


@pytest.mark.parametrize(
    ("setting", "told"),
    [
        ("data.manifest=nowhere/train.jsonl", "nowhere"),
        ("data.manifest=pipe:touch {out}/ran; cat x.tar", "pipe:touch"),
        ('data.manifest="{{pipe:touch {out}/ran #,x}}.tar"', "is not there or damaged"),
        ("train.steps=[1", "--set 'train.steps=[1' is not valid YAML"),
        ("mixture={{mix: heavy}}", "mixture.mix must be of type float"),
        ("mixture={{mix: 0}}", "the mixture must give shares above 0"),
    ],
)
def test_mistakes_are_one_line(capsys, tiny_corpus, tmp_path, setting, told):
    arguments = [*command(1, tiny_corpus, tmp_path), "--set", setting.format(out=tmp_path)]
    assert stage1.main(arguments) == 1
    message = capsys.readouterr().err.strip()
    assert told in message and "\n" not in message and message.startswith("error: ")
    assert not (tmp_path / "ran").exists()


def test_a_missing_extra_is_one_line(capsys, tiny_corpus, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    monkeypatch.delitem(sys.modules, "duotok.recipes.training.loop")
    assert stage1.main(command(1, tiny_corpus, tmp_path)) == 1
    assert "accelerate is missing; in the checkout: pip install '.[train]'" in capsys.readouterr().err
