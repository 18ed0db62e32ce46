"""The place and the precision of a fine-tuned model."""

from pathlib import Path

import pytest

from duotok.recipes.finetuning.personal_model import is_half, require_free, write_model
from duotok.tokenizer.common.errors import CheckpointError, ConfigError


def test_nothing_is_overwritten(tmp_path: Path):
    require_free(tmp_path / "new")
    (tmp_path / "empty").mkdir()
    require_free(tmp_path / "empty")
    (tmp_path / "file").write_text("mine")
    for taken in (tmp_path, tmp_path / "file"):
        with pytest.raises(ConfigError, match="exists already"):
            require_free(taken)


def test_the_precision_of_a_bundle_is_seen(tiny_components: dict[str, Path], tiny_bundle: Path):
    assert not is_half(tiny_components["lm"]) and is_half(tiny_bundle / "lm")


def test_a_language_model_of_another_tokenizer_makes_no_bundle(
    tiny_bundle: Path, tmp_path: Path, make_tiny_components
):
    from duotok.lm.dual_track.model import DualTrackLM

    other = DualTrackLM.from_pretrained(make_tiny_components(tmp_path / "other", seed=1)["lm"])
    with pytest.raises(CheckpointError, match="was trained on the tokenizer"):
        write_model(
            tmp_path / "mine", source=tiny_bundle, lm=other, work=tmp_path, name="mine", provenance={}
        )
    assert not (tmp_path / "mine").exists()
