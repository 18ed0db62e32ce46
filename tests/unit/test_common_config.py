from dataclasses import asdict, dataclass, field

import pytest

from duotok.tokenizer.common.config import config_from_dict, load_config
from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 1.0
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    limit: float | None = None
    shares: dict[str, float] = field(default_factory=dict)


def test_yaml_with_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ninner: {rate: 3e-4}\n")
    config = load_config(Outer, path, ["inner.sizes=[4]", "limit=2", "shares={mix: 2}"])
    assert config == Outer(name="x", inner=Inner(rate=3e-4, sizes=(4,)), limit=2.0, shares={"mix": 2.0})
    assert config_from_dict(Outer, asdict(config)) == config


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "inner": {"rates": 1}}, "known are rate, sizes"),
        ({}, "'name' is missing"),
        ({"name": 3}, "must be of type str"),
        ({"name": "x", "inner": 3}, "section"),
        ({"name": "x", "inner": {"sizes": 3}}, "list"),
        ({"name": "x", "shares": 5}, "config.shares must be a section of settings, got 5"),
        ({"name": "x", "shares": {"mix": "heavy"}}, "config.shares.mix must be of type float, got 'heavy'"),
        ({"name": "x", "shares": {3: 1.0}}, "a name in config.shares must be of type str, got 3"),
        ({"name": "x", 1: 2, "a": 3}, "unknown setting 1"),
    ],
)
def test_mistakes_are_named(mapping, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(Outer, mapping)


@pytest.mark.parametrize(
    "override", ["inner.rate=[1", "limit=2026-99-99", "name=" + 5000 * "[", "shares={a: 1"]
)
def test_an_override_that_is_no_yaml_is_one_line(tmp_path, override):
    (tmp_path / "recipe.yaml").write_text("name: x\n")
    with pytest.raises(ConfigError, match="^--set .*is not valid YAML: .*") as told:
        load_config(Outer, tmp_path / "recipe.yaml", [override])
    assert "\n" not in str(told.value)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Outer, tmp_path / "bad.yaml")
