"""Encode a corpus for the diffusion decoder: codes at 25 Hz and latents at 50 Hz of one track.

Run: python -m duotok.recipes.renderer.latents --tokenizer runs/small/stage3/final \\
         --vae runs/small/vae/final --manifest data/popband/train.jsonl --track accompaniment \\
         --out data/latents/train
Run the same command again to go on after an interruption; --device cuda encodes on a GPU.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.recipes.corpus.manifest import Item
    from duotok.recipes.renderer.latent_shards import Pair
    from duotok.renderer.vae_contract import Autoencoder
    from duotok.tokenizer.model import DuoTokenizer

CHUNK_SECONDS = 40  # of the VAE's encoder at a time
MARGIN_SECONDS = 2  # seen on both sides of a chunk; more than the encoder reaches


def encode_latents(vae: "Autoencoder", wave: "Tensor") -> "Tensor":
    """Return latents [frames, latent_dim] of wave [2, samples] by chunks, as one pass would give them."""
    import torch

    hop = vae.hop_samples
    frames = -(-wave.shape[1] // hop)
    chunk, margin = CHUNK_SECONDS * vae.latent_rate_hz, MARGIN_SECONDS * vae.latent_rate_hz
    parts = []
    for start in range(0, frames, int(chunk)):
        stop = min(frames, start + int(chunk))
        low, high = max(0, start - int(margin)), min(frames, stop + int(margin))
        latents = vae.encode(wave[None, :, low * hop : high * hop])[0]  # [latent_dim, frames]
        parts.append(latents[:, start - low : stop - low])
    return torch.cat(parts, dim=1).T


def pad_to_frames(wave: "Tensor") -> "Tensor":
    """Pad wave [2, samples] with silence to whole codes, two latent frames each."""
    from torch.nn import functional

    from duotok.tokenizer.model import HOP_SAMPLES

    return functional.pad(wave, (0, -wave.shape[1] % HOP_SAMPLES))


def encode_item(item: "Item", track: str, tokenizer: "DuoTokenizer", vae: "Autoencoder") -> "Pair":
    """Return the codes and the latents of one item's track, two latent frames per code exactly."""
    device = next(tokenizer.parameters()).device
    wave = pad_to_frames(item.read(track).to(device))
    return tokenizer.encode(wave[None], track)[0].cpu(), encode_latents(vae, wave).cpu()


def require_latent_rate(vae: "Autoencoder", folder: str | Path, code_rate_hz: float) -> None:
    """Raise CheckpointError unless the VAE of that folder has as many latents per code as the decoder."""
    from duotok.renderer.diffusion import LATENTS_PER_FEATURE
    from duotok.tokenizer.common.errors import CheckpointError

    if vae.latent_rate_hz != LATENTS_PER_FEATURE * code_rate_hz:
        raise CheckpointError(
            f"the VAE {folder} gives latents at {vae.latent_rate_hz:g} Hz, the decoder needs "
            f"{LATENTS_PER_FEATURE} per code, {LATENTS_PER_FEATURE * code_rate_hz:g} Hz; "
            f"give a VAE of that rate"
        )


def encode_corpus(arguments: argparse.Namespace) -> None:
    """Encode the items that no shard holds yet."""
    import torch
    from tqdm import tqdm

    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.renderer.latent_shards import LatentShards, ShardOrigin, write_shard
    from duotok.renderer.vae_open import open_vae
    from duotok.tokenizer.model import DuoTokenizer

    tokenizer = DuoTokenizer.from_pretrained(arguments.tokenizer).to(arguments.device)
    vae = open_vae(arguments.vae).to(arguments.device)
    require_latent_rate(vae, arguments.vae, tokenizer.frame_rate_hz)
    origin = ShardOrigin(
        track=arguments.track,
        tokenizer_fingerprint=str(tokenizer.fingerprint),
        vae_fingerprint=str(vae.fingerprint),
    )
    shards = LatentShards(arguments.out)
    shards.require(origin)
    items = [item for item in read_manifest(arguments.manifest) if item.id not in shards.frames]
    number = 1 + max((int(path.stem.split("-")[1]) for path in shards.paths), default=-1)
    with torch.inference_mode(), tqdm(total=len(items), unit="item", disable=None) as progress:
        for first in range(0, len(items), arguments.items_per_shard):
            pairs = {}
            for item in items[first : first + arguments.items_per_shard]:
                pairs[item.id] = encode_item(item, arguments.track, tokenizer, vae)
                progress.update()
            write_shard(arguments.out, number, pairs, origin)
            number += 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Codes and latents of a corpus, for the diffusion decoder")
    parser.add_argument("--tokenizer", type=Path, required=True, help="tokenizer folder")
    parser.add_argument("--vae", type=Path, required=True, help="VAE folder")
    parser.add_argument("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    parser.add_argument("--track", choices=("vocal", "accompaniment"), default="accompaniment")
    parser.add_argument("--out", type=Path, required=True, help="folder of the shards")
    parser.add_argument("--items-per-shard", type=int, default=32)
    parser.add_argument("--device", default="cpu", help="cpu, cuda or mps")
    arguments = parser.parse_args(argv)
    if arguments.items_per_shard < 1:
        parser.error("--items-per-shard must be at least 1")
    return guard(lambda: encode_corpus(arguments))


if __name__ == "__main__":
    sys.exit(main())
