"""The command `diagnose` on components of tiny size: pictures, figures, what is kept, what is refused."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.research import diagnose, diagnosis
from duotok.recipes.research.probe import MEL_BANDS, pool_mel
from duotok.tokenizer.spectra import LogMel


@pytest.fixture(scope="module")
def labelled_corpus(tiny_corpus, tmp_path_factory):
    """The tiny corpus with two styles, keys and tempi, its audio where it was."""
    root = tmp_path_factory.mktemp("labelled")
    for split in ("train", "test"):
        items = [
            dataclasses.replace(
                item,
                stems={stem: str(item.path(stem)) for stem in item.stems},
                mix=str(item.path("mix")),
                style=("rock", "folk")[number % 2],
                key=("C:maj", "Eb:min")[number % 2],
                tempo_bpm=(70.0, 140.0)[number % 2],
            )
            for number, item in enumerate(read_manifest(tiny_corpus / f"{split}.jsonl"))
        ]
        write_manifest(root / f"{split}.jsonl", items)
    return root


def run(corpus, out, *options) -> int:
    return diagnose.main(["--corpus", str(corpus), "--out", str(out), "--items", "3", *map(str, options)])


@pytest.fixture(scope="module")
def diagnosed(labelled_corpus, tiny_bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("diagnosed")
    assert run(labelled_corpus, out, "--bundle", tiny_bundle, "--seconds", 6, "--epochs", 1) == 0
    return out


def test_every_part_leaves_a_picture_and_its_figures(diagnosed):
    figures = json.loads((diagnosed / "diagnostics.json").read_text())
    parts = ["codes", "context", "corruption", "predictability", "probe"]
    assert sorted({name.split(".")[0] for name in figures}) == parts
    assert sorted(path.stem for path in diagnosed.glob("*.png")) == parts
    for part in parts:
        picture = imread(diagnosed / f"{part}.png")
        assert picture.shape[0] > 300 and picture.shape[1] > 900
        assert picture[..., :3].std() > 0.05  # there is something on it
        assert figures[f"{part}.seconds"] > 0
    for promised in (
        "predictability.cnbpt_unconditional_average",
        "corruption.mismatch_cost_percent",
        "corruption.mask_100_cost_first_5s_percent",
        "corruption.shift_200ms_cost_error_percent",
        "context.cnbpt_unconditional_vocal_5s",
        "context.cnbpt_vocal_to_accompaniment_same_frames_6s",
        "codes.vocal_utilization",
        "codes.accompaniment_normalized_entropy",
        "probe.style_vocal_mel_linear_accuracy",
        "probe.key_both_codes_conformer_macro_auc",
        "probe.style_majority_macro_ap",
        "probe.tempo_accompaniment_codes_linear_accuracy",
    ):
        assert np.isfinite(figures[promised]), promised
    assert figures["codes.vocal_tokens"] == 3 * 200 and figures["probe.train_recordings"] == 4
    shares = [value for name, value in figures.items() if name.endswith(("accuracy", "_ap", "_auc"))]
    assert shares and all(0 <= value <= 1 for value in shares)


def test_kept_tokens_are_used_again_and_other_parts_stay(diagnosed, labelled_corpus, tiny_bundle, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(diagnosed, out)
    without_sound = tmp_path / "corpus"
    without_sound.mkdir()
    for split in ("train", "test"):
        items = read_manifest(labelled_corpus / f"{split}.jsonl")
        lost = [dataclasses.replace(item, stems=dict.fromkeys(item.stems, "lost.wav")) for item in items]
        write_manifest(without_sound / f"{split}.jsonl", lost)
    before = json.loads((out / "diagnostics.json").read_text())
    options = ("--bundle", tiny_bundle, "--parts", "codes", "probe", "--epochs", 1, "--no-mel")
    assert run(without_sound, out, *options) == 0
    after = json.loads((out / "diagnostics.json").read_text())
    assert before.keys() - after.keys() == {name for name in before if "mel_linear" in name}
    changed = {name for name, value in after.items() if value != before[name]}
    assert changed <= {"codes.seconds", "probe.seconds"}


def test_finished_parts_are_kept_when_a_later_one_fails(labelled_corpus, tiny_bundle, tmp_path, capsys):
    (tmp_path / "corpus").mkdir()
    shutil.copy(labelled_corpus / "test.jsonl", tmp_path / "corpus")  # no train.jsonl: the probe must fail
    out = tmp_path / "out"
    parts = ("--parts", "probe", "codes")
    assert run(tmp_path / "corpus", out, "--bundle", tiny_bundle, *parts) == 1
    printed = capsys.readouterr()
    assert "error: probe: cannot read the manifest" in printed.err and "train.jsonl" in printed.err
    assert "codes.png" in printed.out
    figures = json.loads((out / "diagnostics.json").read_text())
    assert {name.split(".")[0] for name in figures} == {"codes"}


def test_an_interrupt_keeps_what_is_finished(labelled_corpus, tiny_bundle, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(diagnosis, "measure_corruption", interrupt)
    monkeypatch.setattr(diagnose, "PARTS", ("codes", "corruption"))
    options = ("--bundle", tiny_bundle, "--seconds", 6, "--parts", "codes", "corruption")
    assert run(labelled_corpus, tmp_path, *options) == 130
    assert "finished parts are kept" in capsys.readouterr().err
    assert "codes.vocal_utilization" in json.loads((tmp_path / "diagnostics.json").read_text())


def test_one_unreadable_item_is_left_out_with_its_reason(labelled_corpus, tiny_bundle, tmp_path):
    items = read_manifest(labelled_corpus / "test.jsonl")
    items[0] = dataclasses.replace(items[0], stems={**items[0].stems, "vocal": "lost.wav"})
    (tmp_path / "corpus").mkdir()
    write_manifest(tmp_path / "corpus" / "test.jsonl", items)
    out = tmp_path / "out"
    assert run(tmp_path / "corpus", out, "--bundle", tiny_bundle, "--parts", "codes") == 0
    assert json.loads((out / "diagnostics.json").read_text())["codes.vocal_tokens"] == 2 * 200
    (reason,) = json.loads((out / "unreadable.json").read_text()).values()
    assert "lost.wav does not exist" in reason


def test_a_tokenizer_without_a_language_model(labelled_corpus, tiny_components, tmp_path, capsys):
    options = ("--tokenizer", tiny_components["tokenizer"])
    with pytest.raises(SystemExit) as stopped:
        run(labelled_corpus, tmp_path, *options, "--parts", "context")
    assert stopped.value.code == 2 and "--lm beside --tokenizer" in capsys.readouterr().err
    assert run(labelled_corpus, tmp_path, *options, "--epochs", 1, "--no-mel") == 0
    assert {path.stem for path in tmp_path.glob("*.png")} == {"codes", "probe"}


def test_mel_statistics_tell_noise_from_tones():
    times = torch.arange(96_000) / 48_000
    waves = {"tone": 0.1 * torch.sin(2 * torch.pi * 440 * times)[None], "noise": 0.1 * torch.randn(1, 96_000)}
    found = {name: pool_mel(wave, LogMel(MEL_BANDS), clip_frames=25) for name, wave in waves.items()}
    assert {rows.shape for rows in found.values()} == {(2, 2 * MEL_BANDS)}  # two clips of 1 s
    levels = {name: rows[0, :MEL_BANDS] for name, rows in found.items()}
    assert levels["tone"].argmax() < 20 and levels["noise"][64:].min() > levels["tone"][64:].max() + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--items", "1"), "--items must be at least 2"),
        (("--seconds", "1"), "--seconds must be at least 4"),
        (("--bundle", "nowhere", "--parts", "codes"), "nowhere"),
        (("--parts", "corruption", "--seconds", "60"), "lower --seconds"),
    ],
)
def test_bad_input_is_one_line(labelled_corpus, tiny_bundle, tmp_path, capsys, options, message):
    assert run(labelled_corpus, tmp_path, "--bundle", tiny_bundle, *options) == 1
    lines = capsys.readouterr().err.splitlines()
    assert [line for line in lines if line.startswith("error")] and message in "".join(lines)


def test_parts_of_different_training_runs_are_refused(
    labelled_corpus, tiny_bundle, make_tiny_components, tmp_path, capsys
):
    others = make_tiny_components(tmp_path / "others", 7)
    out = tmp_path / "out"
    mixed = ("--tokenizer", tiny_bundle / "tokenizer", "--lm", others["lm"], "--seconds", 6)
    assert run(labelled_corpus, out, *mixed, "--parts", "context") == 1
    assert "learned from the tokenizer" in capsys.readouterr().err
    assert run(labelled_corpus, out, "--tokenizer", tiny_bundle / "tokenizer", "--parts", "codes") == 0
    assert run(labelled_corpus, out, "--tokenizer", others["tokenizer"], "--parts", "codes") == 1
    assert "holds tokens of the tokenizer" in capsys.readouterr().err
