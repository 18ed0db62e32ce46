"""The separator that is always there: the mask head of this project's own tokenizer."""

from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.separator import MaskSeparator


class MaskHeadSeparator:
    """Separates with a separator folder, or a bundle that has one (None: the one that is shipped)."""

    name = "mask-head"

    def __init__(self, checkpoint: str | Path | None = None, device: str | torch.device = "cpu") -> None:
        shipped = Path(str(files("duotok.recipes"))) / "small" / "bundle"
        folder = shipped if checkpoint is None else Path(checkpoint)
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
