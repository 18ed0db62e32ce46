from dataclasses import dataclass, field

import pytest

from duotok.tokenizer.common.config import config_from_dict, config_to_dict, load_config
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


def test_yaml_with_overrides(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("name: x\ninner: {rate: 3e-4}\n")
    config = load_config(Outer, path, ["inner.sizes=[4]", "limit=2"])
    assert config == Outer(name="x", inner=Inner(rate=3e-4, sizes=(4,)), limit=2.0)
    assert config_from_dict(Outer, config_to_dict(config)) == config


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"name": "x", "inner": {"rates": 1}}, "known are rate, sizes"),
        ({}, "'name' is missing"),
        ({"name": 3}, "must be of type str"),
        ({"name": "x", "inner": 3}, "section"),
        ({"name": "x", "inner": {"sizes": 3}}, "list"),
    ],
)
def test_mistakes_are_named(mapping, message):
    with pytest.raises(ConfigError, match=message):
        config_from_dict(Outer, mapping)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(Outer, tmp_path / "none.yaml")
    (tmp_path / "bad.yaml").write_text("a: [")
    with pytest.raises(ConfigError, match="not valid YAML"):
        load_config(Outer, tmp_path / "bad.yaml")
