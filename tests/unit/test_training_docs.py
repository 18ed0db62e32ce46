"""What docs/training.md names is there: modules, files, settings, and the words of failures."""

import math
import re
import shlex
from importlib import import_module
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path

import pytest

from duotok.recipes.lm import data, tokens, train
from duotok.recipes.training import deepspeed_engine, failures
from duotok.recipes.training import run_state as checkpoint
from duotok.tokenizer.common.config import load_config
from duotok.tokenizer.common.errors import ConfigError

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
CODE = re.findall(r"`([^`\n]+)`", PAGE)


def test_modules_and_files_are_there():
    stages = re.findall(r"\| `([a-z0-9_.]+) (?:recipes/|--)", PAGE)
    named = [f"duotok.recipes.{stage}" for stage in stages]
    named += re.findall(r"-m (duotok\.[a-z0-9_.]+[a-z0-9])", PAGE)
    assert len(named) > 10 and not [name for name in named if find_spec(name) is None]
    paths = re.findall(r"recipes/[a-z0-9_/]+(?:\.[a-z]+)?", PAGE)
    assert len(paths) > 10 and not [path for path in paths if not (ROOT / path).exists()]
    ready = {path.name for path in (ROOT / "recipes" / "lm" / "deepspeed").glob("*.json")}
    assert {name for name in CODE if name in ready} == ready


@pytest.mark.parametrize(
    "name", sorted({name for name in CODE if re.fullmatch(r"(train|data|model|validation)\.[a-z_]+", name)})
)
def test_settings_are_the_recipe_s(name):
    recipe = Path(train.__file__).parent / "base.yaml"
    value = load_config(train.Config, recipe)
    for part in name.split("."):
        value = getattr(value, part)
    with pytest.raises(ConfigError):
        load_config(train.Config, recipe, [f"{name}s_that_is_none=1"])


def commands() -> list[str]:
    """Every command line of the page, its continued lines joined."""
    page = re.sub(r"\\\n\s+", "", PAGE)
    lines = re.findall(r"^    (\S.*)$", page, flags=re.MULTILINE)
    return [line for line in lines if " -m duotok." in line and "STAGE" not in line]


@pytest.mark.parametrize("command", commands())
def test_commands_can_be_given(command, capsys):
    launch, _, program = command.partition(" -m ")
    name, *arguments = shlex.split(program)
    module = import_module(name if not name.endswith("songs") else f"{name}.__main__")
    recipe = next((argument for argument in arguments if argument.endswith(".yaml")), None)
    if recipe is not None:
        overrides = [value for key, value in pairwise(arguments) if key == "--set"]
        config = load_config(module.Config, ROOT / recipe, overrides)
        counts = re.findall(r"--n(?:nodes|proc-per-node) (\d+)", launch)
        processes = math.prod(map(int, counts))
        for given in (value for key, value in pairwise(arguments) if key == "--deepspeed"):
            deepspeed_engine.read_deepspeed_config(
                ROOT / given, config.train, precision=config.train.precision, processes=processes
            )
            if module is train:  # the step that the table promises
                assert processes * config.train.batch_size * config.train.accumulate == 512
    with pytest.raises(SystemExit) as end:
        module.main(["--help"])
    known = capsys.readouterr().out
    assert end.value.code == 0
    assert not [part for part in arguments if part.startswith("--") and part not in known]


def test_failures_are_told_in_these_words():
    modules = (checkpoint, deepspeed_engine, failures, data)
    source = "".join(Path(str(each.__file__)).read_text() for each in (*modules, tokens, train))
    source = re.sub(r'"\s*\n\s*f?"', "", source)  # strings over several lines
    lines = re.findall(r"^\| ([^|]+) \|", PAGE[PAGE.index("## What failures say") :], flags=re.MULTILINE)
    told = [line for line in lines if line != "line" and not line.startswith("-")]
    assert len(told) > 10
    for line in told:
        # Numbers and names are filled in; the words around them are the program's.
        words = re.split(r"\.\.\.|\d+|\b[A-Z]\b|[()]", line)
        longest = max(words, key=len).strip(" ,;:")
        assert longest in source, line
