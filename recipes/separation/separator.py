"""What a separator is, how one is opened by name, and how a long wave goes through it in pieces.

"mask-head" is this project's own and needs nothing else. "demucs" and "bs-roformer" are adapters of the
packages of these names; their checkpoints are safetensors, never pickles.
"""

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Protocol

import torch
from torch import Tensor

from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.heads import STEMS

SEPARATORS = ("mask-head", "demucs", "bs-roformer")
PACKAGES = {"demucs": ("demucs", "demucs"), "bs-roformer": ("bs_roformer", "BS-RoFormer")}  # import, PyPI


class Separator(Protocol):
    """Splits a mix into stems."""

    name: str

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """wave [2, samples] float32 at 48 kHz -> {"vocal", "drums", "bass", "other"}, each [2, samples].

        The stems sum to the wave; what belongs to none of them is in "other".
        """
        ...


def require_separator(name: str) -> None:
    """Raise ConfigError unless a separator of this name is known and the package it needs is installed."""
    if name not in SEPARATORS:
        raise ConfigError(f"unknown separator {name!r}; choose one of {', '.join(SEPARATORS)}")
    if name in PACKAGES and find_spec(PACKAGES[name][0]) is None:
        raise _unusable(name, "is not installed")


def _unusable(name: str, reason: str) -> ConfigError:
    package = PACKAGES[name][1]
    return ConfigError(
        f"the separator {name} needs the package {package}, which {reason}: "
        f"pip install {package}, or choose --separator mask-head"
    )


def open_separator(name: str, checkpoint: str | None = None, device: str = "cpu") -> Separator:
    """Return a separator by name; raises ConfigError when its package or its checkpoint is missing.

    checkpoint: mask-head: a separator folder or a bundle that has one, None = the shipped one; demucs: a
    .safetensors file, a folder of them with the YAML of a bag, or a name on the hub, None = "htdemucs";
    bs-roformer: a folder with config.json or config.yaml and model.safetensors, or a hub id.
    """
    require_separator(name)
    if name == "mask-head":
        from duotok.recipes.separation.mask_head import MaskHeadSeparator

        return MaskHeadSeparator(checkpoint, device)
    try:
        if name == "demucs":
            from duotok.recipes.separation.demucs_adapter import DemucsSeparator

            return DemucsSeparator(checkpoint, device)
        from duotok.recipes.separation.roformer_adapter import RoFormerSeparator

        return RoFormerSeparator(checkpoint, device)
    except ImportError as error:
        raise _unusable(name, f"cannot be imported ({error})") from error


def separate_in_pieces(
    wave: Tensor, separate: Callable[[Tensor], Tensor], *, piece: int, overlap: int
) -> Tensor:
    """Run `separate` [2, n] -> [stems, 2, n] over pieces of a wave [2, samples], cross-faded.

    piece and overlap are in samples, 0 < overlap <= piece / 2. Only one piece is in work at a time.
    """
    samples = wave.shape[-1]
    result: Tensor | None = None
    rise = (torch.arange(overlap, dtype=wave.dtype) + 0.5) / overlap  # rise + its mirror image = 1
    for start in range(0, max(1, samples - overlap), piece - overlap):
        stems = separate(wave[:, start : start + piece])
        length = stems.shape[-1]
        if start > 0:
            stems[..., :overlap] *= rise
        if start + length < samples:
            stems[..., -overlap:] *= rise.flip(0)
        if result is None:
            result = torch.zeros(*stems.shape[:-1], samples)
        result[..., start : start + length] += stems
    assert result is not None
    return result


def complete_stems(wave: Tensor, estimates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Four stems that sum to the wave: vocal, drums, bass as estimated (or silent), other = the rest."""
    stems = {stem: estimates.get(stem, torch.zeros_like(wave)) for stem in STEMS[:3]}
    stems["other"] = wave - stems["vocal"] - stems["drums"] - stems["bass"]
    return stems
