"""Convert a published Oobleck autoencoder, such as ear-VAE (arXiv 2509.14912), into a VAE folder.

Run: python -m duotok.recipes.renderer.vae_convert ear_vae_v2.safetensors --out runs/ear_vae
The state dict must have the names of stable-audio-tools. Its shapes tell everything but the sample rate,
which follows from the hop of the published models (960 samples: 48,000 Hz; 1024: 44,100 Hz).
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

SUFFIX = ".safetensors"
# torch's newer names of the magnitude and the direction of a normalized weight.
RENAMED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}


def read_state(path: Path) -> "dict[str, Tensor]":
    """Read a stored state dict; normalized weights get torch's older names."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if path.suffix != SUFFIX:
        raise CheckpointError(
            f"{path} cannot be read, for only {SUFFIX} can hold no program; store the state dict as {SUFFIX} "
            f"first (safetensors.torch.save_file)"
        )
    try:
        stored = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or damaged; give a whole {SUFFIX} file") from error
    state = {}
    for name, tensor in stored.items():
        for new, old in RENAMED.items():
            name = name.replace(new, old)
        state[name] = tensor
    return state


def convert(path: Path, out: Path, sample_rate_hz: int | None = None) -> None:
    """Write the VAE folder of a stored state dict; CheckpointError names the first key that does not fit."""
    import torch

    from duotok.recipes.renderer.vae_names import infer_config, take_over
    from duotok.renderer.vae_oobleck import OobleckVAE

    state = read_state(path)
    try:
        config = infer_config(state, sample_rate_hz)
        with torch.device("meta"):
            vae = OobleckVAE(config)
        take_over(vae, state)
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from error
    vae.save_pretrained(out)
    print(
        f"{out}: {config.latent_dim} latents at {vae.latent_rate_hz:g} Hz of stereo at "
        f"{config.sample_rate_hz} Hz, {config.transformer_blocks} transformer blocks"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="A published Oobleck autoencoder as a VAE folder")
    parser.add_argument("checkpoint", type=Path, help=f"its state dict as {SUFFIX}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the VAE")
    parser.add_argument(
        "--sample-rate",
        type=int,
        metavar="HZ",
        help="of the model (default: 48000 if its hop is 960, 44100 if 1024)",
    )
    arguments = parser.parse_args(argv)
    return guard(lambda: convert(arguments.checkpoint, arguments.out, arguments.sample_rate))


if __name__ == "__main__":
    sys.exit(main())
