"""The diagnostics: measures where the right answer is known; the command: pictures, figures, what is kept."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import score_batch
from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.evaluation import lm_part
from duotok.recipes.evaluation.lm_part import (
    Windows,
    cut_pieces,
    measure_context,
    measure_costs,
    relative_cost,
)
from duotok.recipes.research import diagnose
from duotok.recipes.research.diagnosis import MASK_SHARES, SHIFTS_SECONDS, count_codes, describe_usage

RATE_HZ = 25.0


def make_windows(count=4, frames=150, codes=64, seed=3) -> Windows:
    vocal = torch.randint(0, codes, (count, frames), generator=torch.Generator().manual_seed(seed))
    return Windows(
        codes={"vocal": vocal, "accompaniment": vocal.clone()},  # the vocal tells everything
        partners=[(index + 1) % count for index in range(count)],
        rate_hz=RATE_HZ,
    )


@pytest.fixture(scope="module")
def listening_lm(tiny_components) -> DualTrackLM:
    """A tiny model that has learned to sing along: the accompaniment repeats the vocal."""
    torch.manual_seed(0)
    lm = DualTrackLM.from_pretrained(tiny_components["lm"])
    lm.sheet = lm.sheet_reader = None  # what a random reader makes of a vocal would be noise in the costs
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-2)
    for step in range(60):
        codes = make_windows(frames=100, seed=step).codes
        logits = lm(lm.lay_out(codes, "vocal_to_accompaniment"))["accompaniment"]
        loss = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes["accompaniment"])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return lm.eval()


def test_a_model_that_listens_pays_for_every_damage(listening_lm):
    found = measure_costs(listening_lm, make_windows(), SHIFTS_SECONDS, MASK_SHARES)
    assert "shift_4000ms_cost_percent" in found and "shift_8000ms_cost_percent" not in found  # of 6 s
    damages = [
        name
        for name in found
        if name.startswith(("shift_", "mismatch", "mask_100")) and "_rising_" not in name
    ]
    ends = ("_cost_percent", "_cost_first_5s_percent")
    assert all(found[name] > 50 for name in damages if name.endswith(ends) and "_cost_rise" not in name)
    assert 0 < found["mismatch_cost_error_percent"] < found["mismatch_cost_percent"]
    rising = [found[f"{name}_cost_percent"] for name in MASK_SHARES]
    assert rising == sorted(rising) and rising[0] > 0
    assert found["mask_cost_rising_share"] == 1 and found["mask_cost_least_percent"] == rising[0]
    assert found["mask_cost_rise_percent"] == pytest.approx(rising[-1] - rising[0])


def test_the_standard_error_is_that_of_a_ratio_of_means():
    generator = np.random.default_rng(0)
    intact = generator.uniform(3, 5, 400)
    damaged = 1.1 * intact + generator.normal(0, 0.5, 400)
    percent, error = relative_cost(torch.tensor(damaged), torch.tensor(intact))
    assert percent == pytest.approx(100 * (damaged.mean() / intact.mean() - 1))
    residual = damaged - damaged.mean() / intact.mean() * intact
    assert error == pytest.approx(100 * residual.std() / intact.mean() / 20, rel=0.02)
    assert relative_cost(torch.tensor([2.0]), torch.tensor([1.0]))[1] == 0


def test_pieces_cover_the_windows_and_name_their_ends():
    codes = {"vocal": torch.arange(60).view(2, 30), "accompaniment": torch.arange(60).view(2, 30)}
    pieces, ends = cut_pieces(codes, 20)  # does not divide 30: the two pieces overlap
    assert pieces["vocal"][:, 0].tolist() == [0, 30, 10, 40]
    assert pieces["vocal"][ends][:, -1].tolist() == [29, 59]
    whole, ends = cut_pieces(codes, 30)
    assert torch.equal(whole["vocal"], codes["vocal"]) and ends.tolist() == [0, 1]


def test_context_counts_the_same_frames_with_more_of_the_song(tiny_components):
    lm, windows = DualTrackLM.from_pretrained(tiny_components["lm"]), make_windows()
    found = measure_context(lm, windows, lengths_seconds=(4.0, 6.0, 60.0))
    assert len([name for name in found if name.startswith("cnbpt_")]) == 4 * 2 * 2  # series, curves, lengths
    scores = score_batch(lm, windows.codes["vocal"], windows.codes["accompaniment"], "unconditional")
    bits = scores.loss_nats["vocal"][:, -50:].mean().item() / np.log(2) / 6  # the last 2 s
    assert found["cnbpt_unconditional_vocal_same_frames_6s"] == pytest.approx(bits, rel=1e-5)
    short, long = (found[f"cnbpt_vocal_to_accompaniment_same_frames_{s}s"] for s in (4, 6))
    assert found["gain_vocal_to_accompaniment_percent"] == pytest.approx(100 * (1 - long / short))
    whole = [found[f"cnbpt_unconditional_vocal_{s}s"] for s in (4, 6)]
    assert found["gain_whole_unconditional_vocal_percent"] == pytest.approx(100 * (1 - whole[1] / whole[0]))
    assert found["falling_share_unconditional_vocal"] == float(whole[1] < whole[0])


def test_usage_of_uniform_and_of_collapsed_codes():
    codes = {"vocal": torch.arange(64).repeat(10), "accompaniment": torch.tensor([0] * 600 + [5] * 40)}
    usage = describe_usage(count_codes([codes, codes], dict.fromkeys(codes, 64)))
    assert usage["vocal_utilization"] == usage["vocal_normalized_entropy"] == 1
    assert usage["vocal_perplexity_codes"] == pytest.approx(64)
    assert usage["accompaniment_utilization"] == 2 / 64
    assert usage["accompaniment_share_of_most_used_tenth"] == 1
    assert usage["accompaniment_perplexity_codes"] < 2
    few = describe_usage({"vocal": torch.ones(64, dtype=torch.int64)})
    # 64 draws of 64 equally likely codes reach about 1 - 1/e of them.
    assert few["vocal_utilization_of_uniform_codes"] == pytest.approx(1 - np.exp(-1), abs=0.01)


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
    for promised in """predictability.cnbpt_unconditional_average corruption.mismatch_cost_percent
        corruption.mask_100_cost_first_5s_percent corruption.shift_200ms_cost_error_percent
        context.cnbpt_unconditional_vocal_5s context.cnbpt_vocal_to_accompaniment_same_frames_6s
        codes.vocal_utilization codes.accompaniment_normalized_entropy probe.style_vocal_mel_linear_accuracy
        probe.key_both_codes_conformer_macro_auc probe.style_majority_macro_ap
        probe.tempo_accompaniment_codes_linear_accuracy""".split():
        assert np.isfinite(figures[promised]), promised
    assert figures["codes.vocal_tokens"] == 3 * 200 and figures["probe.train_recordings"] == 4
    shares = [value for name, value in figures.items() if name.endswith(("accuracy", "_ap", "_auc"))]
    assert shares and all(0 <= value <= 1 for value in shares)


def test_kept_tokens_are_used_again_and_other_parts_stay(diagnosed, labelled_corpus, tiny_bundle, tmp_path):
    out = tmp_path / "copy"
    shutil.copytree(diagnosed, out)
    without_sound = tmp_path / "corpus"
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

    monkeypatch.setattr(lm_part, "measure_costs", interrupt)
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
