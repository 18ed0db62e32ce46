"""The GPU check, rehearsed at tiny on the CPU; what the loader alone gives."""

import json
from pathlib import Path

import pytest

from duotok.recipes.research import gpu_check, loader_check


def test_what_can_be_measured_is_and_what_fails_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert sum(part.seconds for part in gpu_check.PARTS.values()) <= 360
    monkeypatch.setitem(gpu_check.PARTS, "lm_flash", gpu_check.Part("LM, flash-attention", 0))
    parts = ["device", "lm_flash", "lm_sdpa", "decoder", "tokenizer", "compose"]
    options = ["--size", "tiny", "--device", "cpu", "--out", str(tmp_path), "--parts"]
    assert gpu_check.main([*options, *parts]) == 0
    found = json.loads((tmp_path / "gpu_check.json").read_text())["parts"]
    assert list(found) == parts and found["device"]["name"] == "CPU"
    assert found["lm_flash"] == {"failed": "not done in 0 s"}
    assert found["lm_sdpa"]["tokens_per_second"] > 0 and found["lm_sdpa"]["memory_gb"] > 0
    assert min(found[part]["audio_seconds_per_second"] for part in ("decoder", "tokenizer")) > 0
    assert found["compose"]["base_operators_times_real_time"] > 0
    table = (tmp_path / "gpu.md").read_text()
    assert "### CPU, size tiny" in table and "| LM, flash-attention | failed not done in 0 s |" in table
    assert all(gpu_check.PARTS[part].title in table for part in parts[1:])


def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert gpu_check.main(["--size", "tiny", "--out", str(tmp_path), "--parts", "device"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: nothing could be measured on cuda: ") and told.count("\n") == 1


def test_the_loader_is_measured_beside_what_a_gpu_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--parts", "lm", "--workers", "1", "--seconds", "0.01"]
    assert loader_check.main([*options, "--out", str(tmp_path / "loader.json")]) == 0
    found = json.loads((tmp_path / "loader.json").read_text())["lm"]
    assert found == json.loads(capsys.readouterr().out)["lm"]
    # 12,000 codes of 5.05e9 operations, by 40 % of 989 TFLOP/s.
    assert found["tflop_per_batch"] == pytest.approx(60.6, rel=0.05)
    assert found["needed_per_second"] == pytest.approx(0.4 * 989 / found["tflop_per_batch"])
    assert min(found["batches_per_second_0_workers"], found["batches_per_second_1_workers"]) > 0


def test_too_short_a_corpus_is_one_line(tiny_corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tars = str(tiny_corpus / "train.jsonl")
    assert loader_check.main(["--parts", "tokenizer", "--tars", tars]) == 1
    assert "has no item of at least 20 s" in capsys.readouterr().err
