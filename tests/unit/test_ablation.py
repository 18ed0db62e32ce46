"""Ablations at size tiny: shared work, resuming, what each variant changes, the table beside the paper's."""

import json
from pathlib import Path

import pytest
import torch

from duotok.recipes.ablation import run, table
from duotok.recipes.ablation.chain import Budget, Chain, Variant, change_model
from duotok.recipes.tokenizer import stage2
from duotok.recipes.training.loop import run_training
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import TRACKS, DuoTokenizer

YAMLS = Path(run.__file__).parent
STEPS = ["stage1=3", "stage2=3", "stage3=3", "lm=3"]


def command(corpus: Path, out: Path, *names: str) -> list[str]:
    arguments = [*(str(YAMLS / f"{name}.yaml") for name in names), "--out", str(out), "--size", "tiny"]
    arguments += ["--train", str(corpus / "train.jsonl"), "--held-out", str(corpus / "test.jsonl")]
    return [*arguments, "--token-items", "3", "--steps", *STEPS]


@pytest.fixture(scope="module")
def out(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four variants, run from the corpus to the table."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("ablation")
    names = ("full_seed0", "full_seed1", "shared_codebook", "without_freezing")
    assert run.main(command(tiny_corpus, folder, *names)) == 0
    return folder


def test_what_variants_have_in_common_is_made_once(out: Path):
    counts = {stage: len(list(out.glob(f"{stage}-*"))) for stage in ("stage1", "stage2", "stage3", "lm")}
    # Seed 1 has a stage 2 of its own; the other variants differ from stage 3 on.
    assert counts == {"stage1": 1, "stage2": 2, "stage3": 4, "lm": 4}
    assert len(list(out.glob("items-*.jsonl"))) == 1


def test_every_variant_has_its_figures_and_the_paper_stands_beside(out: Path):
    comparison = json.loads((out / "table.json").read_text())
    assert [row["variant"]["name"] for row in comparison["variants"]] == [
        "full recipe",
        "full recipe, seed 1",
        "one shared codebook",
        "without freezing",
    ]
    for row in comparison["variants"]:
        figures = row["figures"]
        for track in TRACKS:
            hits = [figures[f"{track}_acc_at_{k}"] for k in (1, 5, 10, 50)]
            assert hits == sorted(hits) and hits[-1] == 1.0  # of 32 codes
            assert 0.5 < figures[f"{track}_cnbpt"] < 1.5 and figures[f"{track}_mel_l1"] > 0
            assert (
                0 < figures[f"{track}_utilization"] <= 1 and 0 <= figures[f"{track}_normalized_entropy"] <= 1
            )
        assert len(row["item_cnbpt"]) == 3
        assert figures["average_cnbpt"] == pytest.approx(sum(row["item_cnbpt"].values()) / 3, abs=1e-5)
    text = (out / "table.md").read_text()
    assert "| *paper: DuoTok* | 0.1433 |" in text and "| without freezing | +" in text.replace("| -", "| +")


def test_a_second_run_makes_nothing_anew(out: Path, tiny_corpus: Path, capsys: pytest.CaptureFixture):
    before = {path: path.stat().st_mtime_ns for path in out.glob("*-*/**/*") if path.is_file()}
    assert run.main(command(tiny_corpus, out, "full_seed0", "shared_codebook")) == 0
    assert {path: path.stat().st_mtime_ns for path in out.glob("*-*/**/*") if path.is_file()} == before
    assert "one shared codebook" in capsys.readouterr().out


def test_an_interrupted_stage_ends_as_an_uninterrupted_one(out: Path, tiny_corpus: Path, tmp_path: Path):
    (whole,) = [
        path
        for path in out.glob("stage2-*")
        if json.loads((path / "settings.json").read_text())["train"]["seed"]
    ]
    settings = json.loads((whole / "settings.json").read_text())
    config = load_config(
        stage2.Config, whole / "settings.json", [f"data.manifest={next(out.glob('train-*.jsonl'))}"]
    )
    torch.manual_seed(settings["train"]["seed"])
    run_training(stage2.build(config), config.train, tmp_path, stop_after=2)
    run_training(stage2.build(config), config.train, tmp_path)
    assert (tmp_path / "final" / "model.safetensors").read_bytes() == (
        whole / "final" / "model.safetensors"
    ).read_bytes()


def test_variants_are_what_they_say(out: Path):
    found = {}
    for path in out.glob("stage3-*/final"):
        settings = json.loads((path.parent / "settings.json").read_text())
        start = DuoTokenizer.from_pretrained(settings["start_from"])
        end = DuoTokenizer.from_pretrained(path)
        weights = start.encoder.state_dict()
        moved = any(not torch.equal(weights[name], t) for name, t in end.encoder.state_dict().items())
        assert moved is not settings["freeze_encoder"]
        shared = end.config.shared_codebook
        assert torch.equal(end.code_vectors("vocal"), end.code_vectors("accompaniment")) is shared
        found[shared, moved] = path
    assert set(found) == {(False, False), (False, True), (True, False)}


def test_plain_vq_keeps_the_rest_of_the_tokenizer(out: Path):
    start = DuoTokenizer.from_pretrained(next(out.glob("stage2-*/final")))
    changed = change_model(start, load_config(run.Config, YAMLS / "plain_vq.yaml").model)
    before, after = start.state_dict(), changed.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before if not name.startswith("tracks."))
    names = {name for name, _ in changed.route("vocal").quantizer.named_parameters()}
    assert names == {"basis"}
    with pytest.raises(ConfigError, match="quantizers"):
        change_model(start, {"blocks": 2})


def test_every_variant_is_one_that_its_stages_take(tiny_corpus: Path, tmp_path: Path):
    variants = run.read_variants([YAMLS])
    assert len(variants) == 7 and sum(variant.paper in table.PAPER for variant in variants) == 4
    budget = Budget(
        train=tiny_corpus / "train.jsonl", held_out=tiny_corpus / "test.jsonl", out=tmp_path, size="small"
    )
    chain = Chain(budget)
    base = chain.settings("stage2", {}, {}), chain.settings("stage3", {}, {})
    for variant in variants:
        changed = chain.settings("stage2", {}, variant.stage2), chain.settings("stage3", {}, variant.stage3)
        assert (changed != base) is bool(variant.stage2 or variant.stage3), variant.name


def test_a_failing_variant_does_not_stop_the_others(
    out: Path, tiny_corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    bad = tmp_path / "bad.yaml"
    bad.write_text("name: bad\nstage2: {no_such_setting: 1}\n")
    arguments = command(tiny_corpus, out, "full_seed0")
    assert run.main([str(bad), *arguments]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: bad: ") and "no_such_setting" in error
    assert "full recipe" in (out / "table.md").read_text()


@pytest.mark.parametrize(
    "extra, status, message",
    [
        (["--steps", "stage9=1"], 1, "stage9"),
        (["--steps", "many"], 2, "STAGE=N"),
        (["--held-out", "nowhere.jsonl"], 1, "nowhere.jsonl"),
    ],
)
def test_bad_input_is_one_clear_line(
    tiny_corpus: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
    extra: list[str],
    status: int,
    message: str,
):
    try:
        result = run.main([*command(tiny_corpus, tmp_path, "full_seed0"), *extra])
    except SystemExit as exit_:
        result = exit_.code
    assert result == status
    assert message in capsys.readouterr().err.splitlines()[-1]


def comparison(changes: dict[str, float]) -> dict:
    """Made-up figures of the full recipe at 0.5 and 0.51 and of variants that differ from it by so much."""
    rows = [("full recipe", "DuoTok", 0, 0.5), ("again", None, 1, 0.51)]
    rows += [(paper, paper, 0, 0.5 + change) for paper, change in changes.items()]
    return table.describe(
        [
            {
                "variant": {
                    "name": name,
                    "paper": paper,
                    "seed": seed,
                    "model": {},
                    "stage2": {"changed": True} if paper in changes else {},
                    "stage3": {},
                },
                "figures": {"average_cnbpt": value},
                "item_cnbpt": {"a": value - 0.1, "b": value + 0.1},
            }
            for name, paper, seed, value in rows
        ]
    )


def test_claims_are_judged_by_sign_and_noise():
    found = comparison({"w/o Noise": 0.05, "w/o Enc Freeze": -0.05, "w/o MSS": 0.008})
    assert found["seed_spread_cnbpt"] == pytest.approx(0.01)
    verdicts = {claim["name"]: claim.get("verdict") for claim in found["claims"]}
    assert verdicts == {
        "again": None,
        "w/o Noise": "as in the paper",
        "w/o Enc Freeze": "against the paper",
        "w/o MSS": "within the noise",
    }
    noise = next(claim for claim in found["claims"] if claim["name"] == "w/o Noise")
    assert noise["paper_change_cnbpt"] == pytest.approx(0.5374 - 0.4832)
    assert "| w/o Noise | +0.0500 | 0.0000 | +0.0542 | as in the paper |" in table.render_table(found)


def test_table_command_reads_what_run_wrote(out: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    assert table.main([str(out / "table.json")]) == 0
    assert capsys.readouterr().out == (out / "table.md").read_text()
    (tmp_path / "table.json").write_text("[]")
    assert table.main([str(tmp_path / "table.json")]) == 1


def test_variants_of_one_name_are_refused():
    with pytest.raises(ConfigError, match="full recipe"):
        run.read_variants([YAMLS / "full_seed0.yaml", YAMLS / "full_seed0.yaml"])
    assert Variant(name="x") == load_config(run.Config, YAMLS / "full_seed0.yaml", ["name=x", "paper=null"])
