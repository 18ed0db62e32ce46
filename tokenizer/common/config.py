"""YAML or a mapping to nested frozen dataclasses; unknown keys are errors that list the known ones."""

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import yaml

from .errors import ConfigError

ConfigT = TypeVar("ConfigT")


def load_config(cls: type[ConfigT], path: str | Path, overrides: Sequence[str] = ()) -> ConfigT:
    """Read a YAML recipe into cls; overrides are "section.key=value" with YAML values.

    A recipe that says `extends: other.yaml` is that one, beside it, with the settings that it changes.
    """
    mapping = _read_recipe(Path(path))
    if "extends" in mapping:
        changes = mapping
        mapping = _read_recipe(Path(path).parent / str(changes.pop("extends")))
        _merge(mapping, changes)
    for override in overrides:
        _apply_override(mapping, override)
    return config_from_dict(cls, mapping, where=str(path))


def config_from_dict(cls: type[ConfigT], mapping: Mapping[str, Any], where: str = "config") -> ConfigT:
    """Build the dataclass cls from a mapping, nested dataclasses included."""
    fields = {field.name: field for field in dataclasses.fields(typing.cast(Any, cls))}
    unknown = sorted(set(mapping) - set(fields), key=str)
    if unknown:
        raise ConfigError(f"{where}: unknown setting {unknown[0]!r}; known are {', '.join(sorted(fields))}")
    hints = typing.get_type_hints(cls)
    values = {key: _convert(hints[key], value, f"{where}.{key}") for key, value in mapping.items()}
    missing = [
        name
        for name, field in fields.items()
        if name not in values
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        raise ConfigError(f"{where}: the setting {missing[0]!r} is missing; add it")
    return cls(**values)


def _read_recipe(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot read the recipe {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not valid YAML: {error}") from error
    mapping = _parse_yaml(text, str(path)) or {}
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path} must hold a mapping of settings")
    return mapping


def _merge(mapping: dict[str, Any], changes: Mapping[str, Any]) -> None:
    for key, value in changes.items():
        if isinstance(value, dict) and isinstance(mapping.get(key), dict):
            _merge(mapping[key], value)
        else:
            mapping[key] = value


def _apply_override(mapping: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"--set {override!r} must look like section.key=value")
    *sections, last = key.split(".")
    for section in sections:
        mapping = mapping.setdefault(section, {})
        if not isinstance(mapping, dict):
            raise ConfigError(f"--set {override!r}: {section!r} is not a section")
    mapping[last] = _parse_yaml(text, f"--set {override!r}")


def _parse_yaml(text: str, where: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: dates that are none
        reason = (str(error).splitlines() or ["empty"])[0]
        raise ConfigError(f"{where} is not valid YAML: {reason}") from error


def _convert(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section of settings, got {value!r}")
        return config_from_dict(hint, value, where)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        options = [option for option in typing.get_args(hint) if option is not type(None)]
        return None if value is None else _convert(options[0], value, where)
    if origin is tuple:
        if not isinstance(value, (list, tuple)):
            raise ConfigError(f"{where} must be a list, got {value!r}")
        arguments = typing.get_args(hint)
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) != len(value):
            raise ConfigError(f"{where} must have {len(kinds)} entries, got {len(value)}")
        return tuple(_convert(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where} must be a section of settings, got {value!r}")
        name_kind, kind = typing.get_args(hint)
        return {
            _convert(name_kind, name, f"a name in {where}"): _convert(kind, item, f"{where}.{name}")
            for name, item in value.items()
        }
    return _convert_scalar(hint, value, where)


def _convert_scalar(hint: Any, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        with suppress(ValueError):  # a text, for YAML reads 3e-4 as one
            return float(value)
    if hint in (int, float, str, bool) and type(value) is not hint:
        raise ConfigError(f"{where} must be of type {hint.__name__}, got {value!r}")
    return value
