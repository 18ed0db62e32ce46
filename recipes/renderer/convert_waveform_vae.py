"""Convert a published Oobleck autoencoder, such as ear-VAE (arXiv 2509.14912), into a VAE folder.

Run: python -m duotok.recipes.renderer.convert_waveform_vae ear_vae_v2.safetensors --out runs/ear_vae
The state dict must have the names of stable-audio-tools. Its shapes tell everything but the sample rate,
which follows from the hop of the published models (960 samples: 48,000 Hz; 1024: 44,100 Hz).
"""

from __future__ import annotations

import argparse
import itertools
import re
import sys
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.renderer.waveform_vae import OobleckVAE, OobleckVAEConfig

SUFFIX = ".safetensors"
# torch's newer names of the magnitude and the direction of a normalized weight.
RENAMED = {"parametrizations.weight.original0": "weight_g", "parametrizations.weight.original1": "weight_v"}
RATES_HZ = {960: 48_000, 1024: 44_100}  # of the published models, by the samples of a hop
_UNIT = ("snake1", "conv1", "snake2", "conv2")
_TRANSFORMER = {
    "attention_norm": "pre_norm",
    "attention.qkv": "self_attn.to_qkv",
    "attention.out": "self_attn.to_out",
    "feed_forward_norm": "ff_norm",
    "feed_forward.up": "ff.ff.0.proj",
    "feed_forward.down": "ff.ff.2",
}
_ROTATION = "transformers.rotary_pos_emb.inv_freq"
_ROTATION_TOLERANCE = 1e-2  # relative; a state dict may be stored in bfloat16


def read_state(path: Path) -> dict[str, Tensor]:
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

    from duotok.renderer.waveform_vae import OobleckVAE

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


def list_layers(strides: int, transformer_blocks: int) -> dict[str, str]:
    """The published name of every layer of an autoencoder with so many strides and blocks, by our name."""
    layers: dict[str, str] = {}
    for half in ("encoder", "decoder"):
        theirs, ours, last = f"{half}.layers", f"model.{half}", strides + 1
        ends = {"conv1": 0, "snake1": last, "conv2": last + 1}
        layers |= {f"{ours}.{layer}": f"{theirs}.{number}" for layer, number in ends.items()}
        # The encoder's blocks end with their strided convolution, the decoder's begin with it.
        snake, strided, first_unit, conv = (3, 4, 0, "conv1") if half == "encoder" else (0, 1, 2, "conv_t1")
        for block in range(strides):
            inside, own = f"{theirs}.{block + 1}.layers", f"{ours}.block.{block}"
            layers |= {f"{own}.snake1": f"{inside}.{snake}", f"{own}.{conv}": f"{inside}.{strided}"}
            for unit, (number, layer) in itertools.product(range(3), enumerate(_UNIT)):
                layers[f"{own}.res_unit{unit + 1}.{layer}"] = f"{inside}.{first_unit + unit}.layers.{number}"
    for block in range(transformer_blocks):
        for layer, published in _TRANSFORMER.items():
            layers[f"transformer.blocks.{block}.{layer}"] = f"transformers.layers.{block}.{published}"
    return layers


def infer_config(state: Mapping[str, Tensor], sample_rate_hz: int | None = None) -> OobleckVAEConfig:
    """Read the settings off names and shapes; sample_rate_hz: where the hop does not tell it."""
    from duotok.renderer.waveform_vae import OobleckVAEConfig

    count = _count(state, r"encoder\.layers\.(\d{1,2})\.layers\.") - 1  # layer 0 is a convolution
    blocks = _count(state, r"transformers\.layers\.(\d{1,3})\.")
    if count < 1:
        raise CheckpointError(
            "there is no encoder.layers.1.layers.0: this is not the state dict of an Oobleck autoencoder "
            "(names of stable-audio-tools, without a prefix)"
        )
    layers = list_layers(count, blocks)
    width = _shape(state, layers["model.encoder.conv1"])[0]
    strided = [_shape(state, layers[f"model.encoder.block.{block}.conv1"]) for block in range(count)]
    # What cannot be is raised to what can: the comparison of all shapes then tells which tensor is wrong.
    strides = tuple(max(2, kernel // 2) for _, _, kernel in strided)
    multiples = tuple(max(1, out // max(1, width)) for out, _, _ in strided)
    hop = prod(strides)
    if sample_rate_hz is None and hop not in RATES_HZ:
        raise CheckpointError(f"a hop of {hop} samples does not tell the sample rate; give --sample-rate")
    latent_dim = _shape(state, layers["model.decoder.conv1"])[1]
    return OobleckVAEConfig(
        sample_rate_hz=RATES_HZ[hop] if sample_rate_hz is None else sample_rate_hz,
        latent_dim=latent_dim,
        decoder_width=_shape(state, layers["model.decoder.conv2"])[1],
        strides=strides,
        channel_multiples=multiples,
        transformer_blocks=blocks,
        **({"head_dim": _head_dim(state, latent_dim)} if blocks else {}),
    )


def take_over(vae: OobleckVAE, state: Mapping[str, Tensor]) -> None:
    """Give vae, which may be on the meta device, the published weights; all of them must be used."""
    layers = list_layers(len(vae.config.strides), vae.config.transformer_blocks)
    left = dict(state)
    if vae.transformer is not None:
        left.pop(_ROTATION)
    weights = {}
    for name, empty in vae.state_dict().items():
        layer, _, leaf = name.rpartition(".")
        if layer.endswith("norm"):
            leaf = {"weight": "gamma", "bias": "beta"}[leaf]
        key = f"{layers[layer]}.{leaf}"
        tensor = left.pop(key, None)
        if tensor is None:
            raise _missing(key)
        shape = (empty.numel(),) if leaf in ("alpha", "beta") else tuple(empty.shape)
        if tuple(tensor.shape) != shape:
            raise CheckpointError(f"{key} has the shape {tuple(tensor.shape)}, where the others need {shape}")
        weights[name] = tensor.float().reshape(empty.shape)
    if left:
        raise CheckpointError(
            f"{min(left)} has no place in this autoencoder ({len(left)} left over); only Oobleck with a "
            f"transformer over its latents can be converted"
        )
    vae.load_state_dict(weights, assign=True)


def _count(state: Mapping[str, Tensor], pattern: str) -> int:
    """One more than the highest number in names that begin by the pattern; 0 if there is none."""
    found = (re.match(pattern, name) for name in state)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _shape(state: Mapping[str, Tensor], layer: str) -> tuple[int, int, int]:
    """[out, in, kernel] of a convolution."""
    key = f"{layer}.weight_v"
    if key not in state:
        raise _missing(key)
    shape = tuple(state[key].shape)
    if len(shape) != 3 or 0 in shape:
        raise CheckpointError(f"{key} has the shape {shape}, not that of a convolution's weight")
    return shape[0], shape[1], shape[2]


def _head_dim(state: Mapping[str, Tensor], latent_dim: int) -> int:
    """Width of the transformer's heads: rotary positions turn half of a head, in pairs."""
    import torch

    if _ROTATION not in state:
        raise _missing(_ROTATION)
    rotation = state[_ROTATION].float()
    head_dim = 4 * rotation.numel()
    if rotation.ndim != 1 or not head_dim or latent_dim % head_dim:
        raise CheckpointError(
            f"{_ROTATION} has the shape {tuple(rotation.shape)}, where a quarter of a head is needed and "
            f"heads divide the {latent_dim} latents"
        )
    usual = 10_000.0 ** -(torch.arange(len(rotation)) / len(rotation))
    if not torch.allclose(rotation, usual, rtol=_ROTATION_TOLERANCE, atol=0):
        raise CheckpointError(f"{_ROTATION} is not 10000^(-i / {len(rotation)}), the rotation known here")
    return head_dim


def _missing(key: str) -> CheckpointError:
    return CheckpointError(f"{key} is missing; give the whole state dict")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = argparse.ArgumentParser(description="A published Oobleck autoencoder as a VAE folder")
    parser.add_argument("checkpoint", type=Path, help=f"its state dict as {SUFFIX}")
    parser.add_argument("--out", type=Path, required=True, help="folder of the VAE")
    told = "of the model (default: 48000 if its hop is 960, 44100 if 1024)"
    parser.add_argument("--sample-rate", type=int, metavar="HZ", help=told)
    arguments = parser.parse_args(argv)
    return guard(lambda: convert(arguments.checkpoint, arguments.out, arguments.sample_rate))


if __name__ == "__main__":
    sys.exit(main())
