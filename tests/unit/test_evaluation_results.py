"""The results file, the table and the small figures of the evaluation."""

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from duotok.recipes.corpus.manifest import read_manifest, write_manifest
from duotok.recipes.evaluation import excerpts, results, score, speed, table, tokenizer_part
from duotok.tokenizer.common.errors import ConfigError, DataError

ROOT = Path(__file__).parents[2]
FIGURES = {
    "generate.in_key": 0.8,
    "generate.in_key_mismatched": 0.55,
    "generate.rtf_30s": 0.5,
    "tokenizer.vocal_utilization": 0.97,
    "tokenizer.accompaniment_utilization": 0.99,
}


@pytest.fixture
def make_item(tiny_corpus):
    """(name, song, split) -> an item of 40 s, sung from 22 to 30 s."""
    item = read_manifest(tiny_corpus / "test.jsonl")[0]
    item = replace(
        item, seconds=40.0, beats_seconds=[n / 2 for n in range(80)], notes=[(22.0, 30.0, 60, "la")]
    )
    return lambda name, song, split="test": replace(item, id=name, song=song, split=split)


def test_only_the_measured_part_is_replaced(tmp_path):
    path = tmp_path / "new" / "results.json"
    results.merge_results(path, "lm", {"old": 1.0})
    results.merge_results(path, "generate", {"rtf_30s": 0.5})
    merged = results.merge_results(path, "lm", {"new": 2})
    assert merged == {"generate.rtf_30s": 0.5, "lm.new": 2} == json.loads(path.read_text())
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_a_damaged_results_file_and_a_figure_that_is_no_number_are_refused(tmp_path):
    path = tmp_path / "damaged.json"
    for text in ("{", "[1]", '{"a": "b"}'):
        path.write_text(text)
        with pytest.raises(DataError, match="damaged.json"):
            results.merge_results(path, "lm", {"new": 1.0})
        assert path.read_text() == text
    with pytest.raises(DataError, match="lm.cost"):
        results.merge_results(tmp_path / "results.json", "lm", {"cost": math.nan})


def test_table_shows_what_is_there_and_nothing_else():
    text = table.render_table(FIGURES)
    assert "| in-key minus mismatched | +0.25 (0.80 against 0.55) | +0.15 or more |" in text
    assert "| codebook utilization | 0.97 / 0.99 | 0.90 or more |" in text
    assert "Language model" not in text and "180 s" not in text


def test_table_fills_the_block_of_a_readme_and_a_page(tmp_path, capsys):
    readme, path, page = (tmp_path / name for name in ("README.md", "results.json", "page.md"))
    readme.write_text(f"before\n{table.BEGIN}\nold \\1\n{table.END}\nafter\n")
    path.write_text(json.dumps(FIGURES))
    for _ in range(2):
        assert table.main([str(path), "--readme", str(readme), "--results", str(page)]) == 0
    few = table.render_table(FIGURES, in_readme=True)
    link = "All figures: [page.md](page.md)."
    assert readme.read_text() == f"before\n{table.BEGIN}\n{few}\n\n{link}\n{table.END}\nafter\n"
    assert page.read_text().endswith(f"\n{table.render_table(FIGURES)}\n")
    readme.write_text("no marks")
    assert table.main([str(path), "--readme", str(readme)]) == 1
    assert readme.read_text() == "no marks"
    assert table.BEGIN in capsys.readouterr().err


def test_readme_and_page_show_the_shipped_figures():
    """Eight rows tell the most; the page has them all, and both are what the command makes."""
    figures = results.read_results(ROOT / "recipes" / "small" / "results.json")
    few = table.render_table(figures, in_readme=True).splitlines()
    assert len(few) == 2 + 8
    assert "\n".join(few) in (ROOT / "README.md").read_text(encoding="utf-8")
    assert table.render_table(figures) in (ROOT / "docs" / "results.md").read_text(encoding="utf-8")


def test_frame_correlation_leaves_out_silence():
    target = torch.zeros(4, 12)
    target[:2, 0] = 1.0
    found = target.clone()
    found[2:] = torch.rand(2, 12, generator=torch.Generator().manual_seed(0))
    assert tokenizer_part.frame_correlation(found, target) == pytest.approx(1.0)
    assert tokenizer_part.frame_correlation(found, torch.zeros(4, 12)) == 0.0
    shifted = found.roll(1, dims=1)
    assert tokenizer_part.frame_correlation(shifted, target) == pytest.approx(-1 / 11, abs=1e-4)


def test_excerpts_spread_over_songs_and_take_the_singing(make_item):
    items = [make_item(f"{song}{index}", song) for song in "abc" for index in range(4)]
    chosen = excerpts.choose_excerpts(items, count=6, seconds=10.0, seed=3)
    assert sorted(excerpt.item.song for excerpt in chosen[:3]) == ["a", "b", "c"]
    assert len({excerpt.item.id for excerpt in chosen}) == 6
    assert all(20.0 <= excerpt.start_seconds <= 22.0 for excerpt in chosen)
    again = excerpts.choose_excerpts(items, count=6, seconds=10.0, seed=3)
    assert [excerpt.item.id for excerpt in again] == [excerpt.item.id for excerpt in chosen]
    assert chosen[0].beats_seconds[0] == 0.0 and chosen[0].beats_seconds[-1] == 10.0
    twice = excerpts.choose_excerpts(items, count=99, seconds=10.0, seed=3, per_item=2)
    assert [each.item.id for each in twice[:12]] == [each.item.id for each in twice[12:]]
    assert all(abs(a.start_seconds - b.start_seconds) >= 10 for a, b in zip(twice, twice[12:], strict=False))
    with pytest.raises(DataError, match="40 s"):
        excerpts.choose_excerpts(items, count=6, seconds=60.0, seed=3)


def test_items_of_other_splits_are_refused(make_item, tmp_path):
    write_manifest(tmp_path / "test.jsonl", [make_item("one", "a"), make_item("two", "b", split="train")])
    with pytest.raises(DataError, match="two"):
        excerpts.read_split(tmp_path)


def test_a_missing_corpus_is_one_line_and_exit_code_1(tmp_path, capsys):
    out = tmp_path / "results.json"
    for part in score.PARTS:
        code = score.main([part, "--corpus", str(tmp_path), "--bundle", str(tmp_path), "--out", str(out)])
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 1 and len(lines) == 1 and lines[0].startswith("error: ")
    assert not out.exists()


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="--items"):
        excerpts.Settings(corpus=Path("."), bundle=Path("."), items=1)


def test_peak_memory_is_the_process_own_and_not_its_parents():
    ballast = np.ones(60_000_000)  # 480 MB that a started process must not inherit
    code = "from duotok.recipes.evaluation.speed import peak_memory_gb; print(peak_memory_gb())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0.005 < float(done.stdout) < 0.3
    assert speed.peak_memory_gb() > ballast.nbytes / 1e9
