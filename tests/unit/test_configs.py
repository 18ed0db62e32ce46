"""Every YAML recipe is started by the command in its head, loads into its Config, and can be built."""

import dataclasses
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from accelerate import init_empty_weights
from torch import nn

from duotok.tokenizer.common.config import config_from_dict, load_config
from duotok.tokenizer.common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
RUN_LINE = re.compile(r"# Run: .*-m (duotok\.recipes\.[\w.]+) (?:[^#\n]*\s)?(recipes/[\w/.-]+\.yaml)")
RECIPES = sorted(
    path
    for path in (ROOT / "recipes").rglob("*.yaml")
    if "duotok.recipes" in path.read_text(encoding="utf-8") or path.stem in ("tiny", "small", "base")
)
TRAINED = (
    *(f"tokenizer/stage{stage}" for stage in (1, 2, 3)),
    "lm",
    "lm/separator",
    "renderer/train_spectral_vae",
    "renderer/train_diffusion",
    "renderer/train_acoustic_codec",
)
SIZES = ("tiny", "small", "base")

all_recipes = pytest.mark.parametrize("path", RECIPES, ids=[str(path.relative_to(ROOT)) for path in RECIPES])


def module_of(path: Path) -> ModuleType:
    """The program that the recipe's head says it belongs to."""
    match = RUN_LINE.search(path.read_text(encoding="utf-8"))
    assert match, f"{path} must say '# Run: python -m duotok.recipes.… <its path>' in its head"
    return importlib.import_module(match[1])


def models_in(config: Any) -> list[tuple[type[nn.Module], Any]]:
    """The modules that a recipe describes: each XConfig that has a module X beside it."""
    found = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if not dataclasses.is_dataclass(value):
            continue
        name = type(value).__name__.removesuffix("Config")
        candidate = getattr(sys.modules[type(value).__module__], name, None)
        if isinstance(candidate, type) and issubclass(candidate, nn.Module):
            found.append((candidate, value))
    return found


@pytest.mark.parametrize("recipe", TRAINED)
def test_every_trained_part_has_its_three_sizes(recipe):
    assert {path.stem for path in (ROOT / "recipes" / recipe).glob("*.yaml")} >= set(SIZES)


@all_recipes
def test_head_names_its_program_and_itself(path):
    match = RUN_LINE.search(path.read_text(encoding="utf-8"))
    assert match and match[2] == str(path.relative_to(ROOT))
    module = module_of(path)
    assert callable(module.main) and dataclasses.is_dataclass(module.Config)


@all_recipes
def test_recipe_loads_and_survives_a_round_trip(path):
    config = load_config(module_of(path).Config, path)
    assert config_from_dict(type(config), dataclasses.asdict(config)) == config


@all_recipes
def test_models_of_a_recipe_can_be_built_without_memory(path):
    config = load_config(module_of(path).Config, path)
    for model_class, model_config in models_in(config):
        # Only weights are left out: the front ends compute their filters.
        with init_empty_weights(include_buffers=False):
            model = model_class(model_config)
        count = sum(parameter.numel() for parameter in model.parameters())
        assert count > 0
        if path.stem == "tiny":
            assert count < 10_000_000


@all_recipes
def test_an_unknown_setting_is_refused(path):
    with pytest.raises(ConfigError, match="no_such_setting"):
        load_config(module_of(path).Config, path, ["no_such_setting=1"])


@pytest.mark.parametrize("size", SIZES)
def test_decoder_takes_the_features_of_the_tokenizer_of_its_size(size):
    configs = {}
    for recipe in ("tokenizer/stage1", "renderer/train_diffusion"):
        path = ROOT / "recipes" / recipe / f"{size}.yaml"
        configs[recipe] = load_config(module_of(path).Config, path).model
    assert configs["renderer/train_diffusion"].feature_dim == configs["tokenizer/stage1"].dim


def test_the_base_tokenizer_is_the_papers():
    path = ROOT / "recipes/tokenizer/stage1/base.yaml"
    model = load_config(module_of(path).Config, path).model
    assert 2 * model.blocks == 24
    assert (model.vocal_codes, model.accompaniment_codes) == (32_768, 32_768)


ABLATIONS = {"a1": {"features"}, "a2": {"level_weights"}, "a3": {"model.is_parallel"}}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_of_the_token_separator_changes_one_thing(name):
    small, ablated = (
        dataclasses.asdict(load_config(module_of(path).Config, path))
        for path in (ROOT / "recipes/lm/separator" / f"{each}.yaml" for each in ("small", name))
    )
    small |= {f"model.{key}": value for key, value in small.pop("model").items()}
    ablated |= {f"model.{key}": value for key, value in ablated.pop("model").items()}
    assert {key for key in small if small[key] != ablated[key]} == ABLATIONS[name]


def test_a_recipe_that_extends_another_says_which_is_missing(tmp_path):
    path = tmp_path / "more.yaml"
    path.write_text("extends: none.yaml\n")
    with pytest.raises(ConfigError, match=r"cannot read the recipe .*none\.yaml"):
        load_config(module_of(ROOT / "recipes/lm/separator/a1.yaml").Config, path)


def test_the_reproduction_starts_what_there_is():
    script = (ROOT / "recipes" / "small" / "reproduce.sh").read_text(encoding="utf-8")
    trained = re.findall(r"^\s*train ([\w.]+) ([\w/]+\.yaml)", script, flags=re.MULTILINE)
    assert len(trained) > 8
    for module, recipe in trained:
        assert module_of(ROOT / "recipes" / recipe).__name__ == f"duotok.recipes.{module}"
    for module in re.findall(r"-m (duotok\.recipes\.[\w.]+)", script):
        found = importlib.import_module(module)
        runs = found if hasattr(found, "main") else importlib.import_module(f"{module}.__main__")
        assert callable(runs.main)
