"""Settings of one generation: how the language model samples, how the renderer paints, how loud the band is.

Kept apart from the pipeline so that a command line can show them without loading torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from duotok.tokenizer.common.config import config_from_dict
from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class GenerationSettings:
    """What can be changed between two accompaniments of the same vocal; a bundle may bring other defaults."""

    guidance: float = 1.5  # classifier-free guidance of the language model; 1 = none
    temperature: float = 0.95  # 0 takes the most likely code
    top_k: int = 100  # most likely codes to draw from; 0 = all
    top_p: float = 0.95  # smallest set of codes with this probability; 1 = all
    steps: int = 8  # solver steps of the diffusion decoder
    render_guidance: float = 2.0  # classifier-free guidance of the diffusion decoder; 1 = none
    accompaniment_db: float = -1.0  # loudness of the accompaniment over the vocal's (LUFS)

    def __post_init__(self) -> None:
        limits = {
            "guidance": (0.0, 100.0),
            "temperature": (0.0, 10.0),
            "top_k": (0, 1_000_000),
            "top_p": (0.001, 1.0),
            "steps": (1, 1000),
            "render_guidance": (0.0, 100.0),
            "accompaniment_db": (-60.0, 30.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:  # also refuses NaN
                raise ConfigError(f"{name} must be from {low:g} to {high:g}, got {value}")


def resolve_settings(
    bundle_defaults: Mapping[str, Any], chosen: Mapping[str, Any], where: str = "settings"
) -> GenerationSettings:
    """The chosen settings over the bundle's defaults over the general ones; None counts as not chosen."""
    values = {**bundle_defaults, **{name: value for name, value in chosen.items() if value is not None}}
    return config_from_dict(GenerationSettings, values, where)


def parse_defaults(texts: Sequence[str]) -> dict[str, Any]:
    """Checked settings from "guidance=2.0" texts."""
    general = asdict(GenerationSettings())
    values: dict[str, Any] = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator or name not in general:
            raise ConfigError(f"--default {text!r} must be KEY=VALUE with KEY one of {', '.join(general)}")
        try:
            values[name] = type(general[name])(value)
        except ValueError as error:
            raise ConfigError(f"--default {text!r}: {value!r} is not a number") from error
    resolve_settings({}, values)
    return values
