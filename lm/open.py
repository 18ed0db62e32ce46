"""Any language model of this project, by what its folder's config.json says it is."""

from pathlib import Path
from typing import Any

from ..tokenizer.common.checkpoint import open_component
from .contract import LanguageModel
from .dual_track.model import DualTrackLM
from .hierarchical.model import HierarchicalLM


def open_lm(folder: str | Path) -> LanguageModel[Any]:
    """Read a language model's folder (CPU, eval); CheckpointError where it is damaged or holds none."""
    return open_component(folder, (DualTrackLM, HierarchicalLM))
