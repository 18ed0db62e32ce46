"""Autoencoders by the folder that holds them, whatever their kind."""

import json
from pathlib import Path

from ..tokenizer.common.errors import CheckpointError
from .vae import SpectralVAE
from .vae_oobleck import OobleckVAE

VAE = SpectralVAE | OobleckVAE
KINDS: dict[str, type[VAE]] = {SpectralVAE.KIND: SpectralVAE, OobleckVAE.KIND: OobleckVAE}


def open_vae(folder: str | Path) -> VAE:
    """Read a folder (CPU, eval) by the kind in its config.json; CheckpointError if it has no known one."""
    path = Path(folder) / "config.json"
    try:
        description = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path} is missing or unreadable; give a complete VAE folder") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON; the VAE folder is damaged") from error
    kind = description.get("kind") if isinstance(description, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        raise CheckpointError(f"{folder} holds a {kind!r}, but a VAE is needed: {' or '.join(KINDS)}")
    return KINDS[kind].from_pretrained(folder)
