"""`finetune` from songs to a model that `generate` takes, and what it says about songs it cannot use."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile

from duotok.lm.dual_track.scoring import LMObjective
from duotok.recipes.accompany import generate
from duotok.recipes.accompany.bundle import assemble_bundle, load_bundle, read_bundle_description
from duotok.recipes.finetuning import finetune


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory, tiny_corpus: Path) -> Path:
    """Four songs as stems, and files that cannot be used."""
    folder = tmp_path_factory.mktemp("finetune") / "songs"
    shutil.copytree(tiny_corpus / "audio" / "train", folder)
    (folder / "damaged").mkdir()
    for name in ("vocal", "accompaniment"):
        (folder / "damaged" / f"{name}.wav").write_bytes(b"no sound")
    return folder


def run(*arguments: object) -> int:
    return finetune.main([*map(str, arguments), "--device", "cpu"])


def test_help_is_instant():
    script = "import sys; from duotok.recipes.finetuning.finetune import main\n"
    script += "try: main(['--help'])\nfinally: print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "--songs" in done.stdout
    assert not {"torch", "numpy", "transformers"} & set(done.stdout.split())


@pytest.mark.parametrize("method", [["--learning-rate", "0.003"], ["--lora", "4", "--learning-rate", "0.03"]])
def test_the_new_model_plays(method, songs, tiny_bundle, vocal_file, tmp_path, capsys):
    model = tmp_path / "mine"
    assert run("--songs", songs, "--out", model, "--model", tiny_bundle, "--steps", 20, *method) == 0
    assert "ACCELERATE_USE_CPU" not in os.environ  # it would decide for whatever trains next
    told = capsys.readouterr()
    assert told.out.startswith(f"{model}: 3 songs learned") and "1 songs left out" in told.out
    assert "damaged: left out" in told.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine"]  # the work folder is gone
    report = json.loads((model / "finetune.json").read_text())
    assert report["learned"]["loss_after_nats"] < report["learned"]["loss_before_nats"]
    assert report["held_out"]["songs"] == 1 and report["held_out_curve"][0][0] == 0
    lowest = min(loss for _, loss in report["held_out_curve"])
    assert report["held_out"]["loss_after_nats"] == pytest.approx(lowest, abs=2e-3)  # 16 bits
    assert [song["held_out"] for song in report["songs"]].count(True) == 1
    assert [left["song"] for left in report["left_out"]] == ["damaged"]

    old, new = load_bundle(tiny_bundle), load_bundle(model)
    assert new.name == "mine" and new.defaults == old.defaults
    assert new.lm.fingerprint != old.lm.fingerprint
    assert new.tokenizer.fingerprint == old.tokenizer.fingerprint
    parts = [read_bundle_description(folder)["components"] for folder in (tiny_bundle, model)]
    assert {part for part in parts[0] if parts[0][part] != parts[1][part]} == {"lm"}
    provenance = json.loads((model / "lm" / "config.json").read_text())["extra"]["finetuned"]
    assert provenance["from_lm_fingerprint"] == old.lm.fingerprint and provenance["songs"] == 3
    out = tmp_path / "out"
    command = ["--vocal", str(vocal_file), "--out", str(out), "--model", str(model), "--steps", "1"]
    assert generate.main([*command, "--device", "cpu"]) == 0
    assert (out / "accompaniment.wav").is_file()


def test_an_interrupted_run_goes_on(songs, tiny_bundle, tmp_path, monkeypatch, capsys):
    command = ["--songs", songs, "--model", tiny_bundle, "--steps", 6, "--held-out", 0]
    assert run(*command, "--out", tmp_path / "whole") == 0
    calls, forward = itertools.count(1), LMObjective.forward

    def interrupt(self, **batch):
        if next(calls) == 4:
            raise KeyboardInterrupt
        return forward(self, **batch)

    monkeypatch.setattr(LMObjective, "forward", interrupt)
    assert run(*command, "--out", tmp_path / "parts") == 130
    assert "run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "parts").exists() and (tmp_path / "parts.work").is_dir()
    assert run(*command, "--out", tmp_path / "parts", "--lora", 2) == 1
    assert "lora_rank" in capsys.readouterr().err
    assert run(*command, "--out", tmp_path / "parts") == 0
    whole, parts = (load_bundle(tmp_path / name).lm.fingerprint for name in ("whole", "parts"))
    assert whole == parts
    assert run(*command, "--out", tmp_path / "parts") == 1
    assert "exists already" in capsys.readouterr().err


def test_mixes_are_separated_by_the_bundle_s_separator(
    songs, tiny_bundle, tiny_components, tiny_separator, tmp_path, capsys, monkeypatch
):
    """The separator is untrained, so singing is not asked for here."""
    monkeypatch.setattr("duotok.recipes.finetuning.song_tokens.LEAST_SUNG_SHARE", -1.0)
    monkeypatch.setattr("duotok.recipes.finetuning.song_tokens.SEPARATED_BELOW_MIX_DB", float("inf"))
    mixes = tmp_path / "mixes"
    mixes.mkdir()
    shutil.copy(songs / "0" / "mix.wav", mixes / "song.wav")
    command = ["--songs", mixes, "--out", tmp_path / "mine", "--steps", 2]
    assert run(*command, "--model", tiny_bundle) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "1 of the 1 songs are mixes" in message and "has no separator" in message
    bundle = assemble_bundle(tmp_path / "bundle", separator=tiny_separator, **tiny_components)
    assert run(*command, "--model", bundle, "--work", tmp_path / "heard") == 0
    assert (tmp_path / "mine" / "separator").is_dir()
    assert (tmp_path / "heard" / "tokens").is_dir()  # kept because it was asked for


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--songs", "nowhere"], "nowhere does not exist"),
        (["--songs", "empty"], "has no recordings"),
        (["--songs", "short"], "none of the 1 songs can be learned: song: it lasts 1.0 s"),
        (["--model", "nowhere"], "not a model"),
        (["--lora", "0"], "--lora must be from 1"),
        (["--out", "short"], "exists already"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, told, songs, tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("short/song").mkdir(parents=True)
    for name in ("vocal", "accompaniment"):
        soundfile.write(f"short/song/{name}.wav", 0.1 * np.ones(48_000), 48_000)
    command = ["--songs", songs, "--out", "mine", "--model", tiny_bundle]
    assert run(*command, *arguments) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert message.startswith("error: ") and told in message
    assert not Path("mine").exists()


def test_without_peft_nothing_is_begun(songs, tiny_bundle, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "peft", None)
    assert run("--songs", songs, "--model", tiny_bundle, "--out", tmp_path / "mine", "--lora", 4) == 1
    message = capsys.readouterr().err.strip()
    assert "pip install peft" in message and "\n" not in message
    assert list(tmp_path.iterdir()) == []
