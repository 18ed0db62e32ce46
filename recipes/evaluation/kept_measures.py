"""Measures of sounds, kept on disk, so that an interrupted or repeated evaluation does not start anew."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from duotok.tokenizer.common.errors import DataError
from duotok.tokenizer.common.files import write_tensors


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What was measured on one sound."""

    figures: dict[str, float] = field(default_factory=dict)  # NaN where something cannot be measured
    features: Tensor | None = None  # [patches, features] for Frechet distances; None = not measured


class KeptMeasures:
    """Files of one folder, each with the measures of several sounds, all made under the same conditions."""

    def __init__(self, folder: Path | None, conditions: Mapping[str, Any]) -> None:
        """folder: None keeps nothing; conditions (JSON): measures made under others are not found."""
        digest = sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()[:12]
        self._folder = None if folder is None else folder / digest

    def read(self, name: str) -> dict[str, Heard] | None:
        """The sounds' measures that were kept under a name; None where there are none."""
        if self._folder is None or not (path := self._path(name)).is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                figures = json.loads((file.metadata() or {})["figures"])
                features = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise DataError(f"{path} is damaged; delete it and run again") from error
        return {
            sound: Heard(
                figures={key: math.nan if value is None else value for key, value in values.items()},
                features=features.get(sound),
            )
            for sound, values in figures.items()
        }

    def keep(self, name: str, sounds: Mapping[str, Heard]) -> None:
        """Write the measures of sounds under a name."""
        if self._folder is None:
            return
        figures = {
            sound: {key: None if math.isnan(value) else value for key, value in heard.figures.items()}
            for sound, heard in sounds.items()
        }
        features = {
            sound: heard.features.to(torch.float32)
            for sound, heard in sounds.items()
            if heard.features is not None
        }
        write_tensors(self._path(name), features, {"figures": json.dumps(figures)})

    def _path(self, name: str) -> Path:
        assert self._folder is not None
        return self._folder / f"{sha256(name.encode()).hexdigest()[:16]}.safetensors"
