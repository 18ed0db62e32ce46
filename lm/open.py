"""Any language model of this project, by what its folder's config.json says it is."""

from pathlib import Path
from typing import Any

from ..tokenizer.common.checkpoint import read_description
from .contract import LanguageModel
from .dual_track.model import DualTrackLM

KINDS: dict[str, type[LanguageModel[Any]]] = {DualTrackLM.KIND: DualTrackLM}


def open_lm(folder: str | Path) -> LanguageModel[Any]:
    """Read a language model's folder (CPU, eval); CheckpointError where it is damaged or holds none."""
    return KINDS[read_description(folder, *KINDS)["kind"]].from_pretrained(folder)
