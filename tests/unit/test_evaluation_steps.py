"""Quality against steps: every trial is heard once, the table names the fewest steps that are good enough."""

import json

import pytest

from duotok.recipes.evaluation.sound_quality import LIVELINESS, MEASURES, measure_quality, worst_loss_percent
from duotok.recipes.research import step_report, steps
from duotok.recipes.research.step_trials import parse_schedule
from duotok.tokenizer.common.errors import ConfigError


def make_row(step: int, quality: float, **changes):
    """A row whose every measure is `quality` times that of a perfect one."""
    values = {m.name: 0.8 * quality if m.higher_is_better else 0.3 / quality for m in MEASURES}
    row = {"decoder": "flow", "solver": "auto", "shift": 1.0, "objective": "flow", LIVELINESS: 1.0}
    row |= {"steps": step, "network_runs": step, **values}
    row |= {"diffusion_seconds_per_second": step / 10, "diffusion_processor_seconds_per_second": step / 10}
    return {**row, **changes}


def test_the_worst_measure_decides():
    perfect, row = make_row(50, 1.0), make_row(8, 1.0, log10_mel_l1=0.33)
    assert worst_loss_percent(row, perfect) == pytest.approx(10)
    assert worst_loss_percent(make_row(8, 1.1), perfect) < 0
    assert worst_loss_percent(make_row(8, 1.0, chroma_correlation=0.6), perfect) == pytest.approx(25)


def test_fewest_steps_within_five_percent_are_chosen():
    rows = [make_row(50, 1.0), make_row(8, 0.99), make_row(4, 0.97), make_row(2, 0.9)]
    step_report.add_losses(rows)
    best = step_report.choose_best(rows, "flow")
    assert best is not None and best["steps"] == 4
    # A blurred sound is not chosen, whatever its distances.
    rows[2][LIVELINESS] = 0.8
    best = step_report.choose_best(rows, "flow")
    assert best is not None and best["steps"] == 8
    assert step_report.choose_best([rows[0], rows[3]], "flow") is None
    table = step_report.render_table(rows)
    assert "fewest within 5 % on every measure: auto, 8 steps" in table


def test_quality_is_that_of_equal_loudness(tiny_corpus):
    from duotok.recipes.corpus.manifest import read_manifest

    wave = read_manifest(tiny_corpus / "test.jsonl")[0].read("accompaniment", seconds=4.0)
    figures = measure_quality(wave, 0.1 * wave)
    assert figures["chroma_correlation"] > 0.99 and figures["log10_mel_l1"] < 1e-3
    assert figures[LIVELINESS] == pytest.approx(1, abs=1e-3)


def test_schedules_are_read():
    assert parse_schedule("heun") == ("heun", 1.0) and parse_schedule("euler:0.5") == ("euler", 0.5)
    for text in ("magic", "euler:x", "euler:0"):
        with pytest.raises(ConfigError):
            parse_schedule(text)


@pytest.fixture(scope="module")
def command(tiny_corpus, tiny_bundle):
    return ["--corpus", str(tiny_corpus), "--split", "test", "--bundle", str(tiny_bundle), "--items", "1",
            "--seconds", "2"]  # fmt: skip


def test_command_leaves_table_figures_and_picture(command, tmp_path, capsys):
    out = tmp_path / "steps"
    run = [*command, "--out", str(out), "--schedule", "auto", "--schedule", "dpm"]
    assert steps.main([*run, "--steps", "2"]) == 0
    first = json.loads((out / "steps.json").read_text())["rows"]
    assert [(row["solver"], row["steps"]) for row in first] == [("auto", 2), ("dpm", 2)]
    # Going on: the finished trials are kept as they are.
    assert steps.main([*run, "--steps", "2", "1"]) == 0
    rows = json.loads((out / "steps.json").read_text())["rows"]
    assert rows[:2] == first and len(rows) == 4
    assert (out / "steps.png").read_bytes().startswith(b"\x89PNG")
    table = (out / "steps.md").read_text()
    assert table.endswith(capsys.readouterr().out[-200:]) and table.count("| dpm |") == 2
    assert steps.main([*run, "--steps", "1", "--guidance", "1"]) == 1
    assert "made by other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--steps", "0"], "steps must be at least 1"),
        (["--schedule", "magic"], "solver must be one of"),
        (["--decoder", "flow"], "NAME=FOLDER"),
        (["--decoder", "flow=nowhere"], "nowhere"),
        (["--track", "vocal"], "vocal"),
        (["--split", "validation"], "validation.jsonl"),
    ],
)
def test_bad_input_is_one_line(arguments, told, command, tmp_path, capsys):
    assert steps.main([*command, *arguments, "--out", str(tmp_path / "out")]) == 1
    message = capsys.readouterr().err.strip()
    assert told in message and "\n" not in message
