"""Autoencoders by the folder that holds them, whatever their kind."""

from pathlib import Path

from ..tokenizer.common.checkpoint import read_description
from .vae import SpectralVAE
from .vae_oobleck import OobleckVAE

VAE = SpectralVAE | OobleckVAE
KINDS: dict[str, type[VAE]] = {SpectralVAE.KIND: SpectralVAE, OobleckVAE.KIND: OobleckVAE}


def open_vae(folder: str | Path) -> VAE:
    """Read a folder (CPU, eval) by the kind in its config.json; CheckpointError if it has no known one."""
    return KINDS[read_description(folder, *KINDS)["kind"]].from_pretrained(folder)
