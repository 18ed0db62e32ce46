"""DeepSpeed config files: the ready ones, what is filled in, what contradicts the recipe, the compiler."""

import json
import logging
from pathlib import Path

import pytest

from duotok.recipes.lm import train
from duotok.recipes.training.deepspeed_engine import check_compiler, read_deepspeed_config
from duotok.recipes.training.task import TrainConfig
from duotok.tokenizer.common.errors import ConfigError

FILES = Path(train.__file__).parent / "deepspeed"
RECIPE = TrainConfig(batch_size=3, accumulate=4, gradient_clip=0.5)


def write(folder: Path, **changes) -> Path:
    settings = json.loads((FILES / "zero2.json").read_text())
    path = folder / "zero.json"
    path.write_text(json.dumps(settings | changes))
    return path


@pytest.mark.parametrize("name", ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"])
def test_ready_files_take_everything_from_the_recipe(name):
    path = FILES / f"{name}.json"
    settings = read_deepspeed_config(path, RECIPE, precision="bf16", processes=2)
    assert settings["zero_optimization"]["stage"] == int(name[4])
    assert settings["train_micro_batch_size_per_gpu"] == 3
    assert settings["gradient_accumulation_steps"] == 4
    assert settings["train_batch_size"] == 24
    assert settings["gradient_clipping"] == 0.5
    assert settings["bf16"] == {"enabled": True}
    assert read_deepspeed_config(path, RECIPE, precision="no", processes=2)["bf16"] == {"enabled": False}
    offloads = settings["zero_optimization"].get("offload_optimizer", {}).get("device") == "cpu"
    assert offloads == name.endswith("offload")
    assert {path.stem for path in FILES.glob("*.json")} >= {name}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_accumulation_steps": 2}, ("gradient_accumulation_steps is 2", "train.accumulate is 4")),
        ({"gradient_clipping": 1.0}, ("gradient_clipping is 1.0", "train.gradient_clip is 0.5")),
        ({"train_micro_batch_size_per_gpu": 1}, ("train.batch_size is 3",)),
        ({"train_batch_size": 12}, ("train_batch_size is 12", "is 24")),
        ({"optimizer": {"type": "Adam"}}, ("remove optimizer",)),
        ({"scheduler": {"type": "WarmupLR"}}, ("remove scheduler",)),
        ({"fp16": {"enabled": True}}, ("fp16 is on", "train.precision is bf16")),
        ({"bf16": {"enabled": False}}, ("bf16.enabled is False", "train.precision is bf16")),
        ({"zero_optimization": {"stage": 4}}, ("stage must be 0, 1, 2 or 3",)),
        ({"zero_optimization": None}, ("zero_optimization",)),
        ({"gradient_clipping": 2.0, "amp": {"enabled": True}}, ("gradient_clipping is 2.0", "amp is on")),
    ],
)
def test_a_contradiction_is_one_line_that_names_both_sides(tmp_path, changes, words):
    path = write(tmp_path, **changes)
    with pytest.raises(ConfigError) as told:
        read_deepspeed_config(path, RECIPE, precision="bf16", processes=2)
    assert "\n" not in str(told.value) and str(path) in str(told.value)
    assert all(word in str(told.value) for word in words)


def test_what_agrees_is_accepted_and_bf16_is_refused_where_the_recipe_says_fp32(tmp_path):
    agreeing = dict(gradient_accumulation_steps=4, gradient_clipping=0.5, fp16={"enabled": False})
    path = write(tmp_path, **agreeing, bf16={"enabled": True}, train_batch_size=24)
    assert read_deepspeed_config(path, RECIPE, precision="bf16", processes=2)["train_batch_size"] == 24
    with pytest.raises(ConfigError, match="bf16.enabled is True, train.precision is fp32"):
        read_deepspeed_config(path, RECIPE, precision="no", processes=2)
    for content in ("{", "[]"):
        path.write_text(content)
        with pytest.raises(ConfigError, match=r"zero\.json"):
            read_deepspeed_config(path, RECIPE, precision="no", processes=1)


def test_what_deepspeed_compiles_is_told_and_needs_a_compiler(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("CXX", "sh")  # any program that is there
    plain, offload = (json.loads((FILES / f"{n}.json").read_text()) for n in ("zero2", "zero2_offload"))
    with caplog.at_level(logging.INFO, logger="duotok"):
        check_compiler(plain, on_cpu=False)
        assert not caplog.records
        check_compiler(offload, on_cpu=True)
    assert "deepspeed_shm_comm and cpu_adam" in caplog.text
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(
        ConfigError, match=r"compiles cpu_adam .*no C\+\+ compiler \(no-such-compiler\): install"
    ):
        check_compiler(offload, on_cpu=False)
    (tmp_path / "py" / "deepspeed_shm_comm").mkdir(parents=True)
    (tmp_path / "py" / "deepspeed_shm_comm" / "deepspeed_shm_comm.so").touch()
    check_compiler(plain, on_cpu=True)  # compiled before: no compiler needed
