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

from duotok.tokenizer.common.command import guard


def encode_corpus(arguments: argparse.Namespace) -> None:
    """Encode the items that no shard holds yet."""
    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.recipes.renderer.latent_shards import ShardOrigin, add_items, encode_item, require_latent_rate
    from duotok.renderer.renderer import open_vae
    from duotok.tokenizer.model import DuoTokenizer

    track = arguments.track
    tokenizer = DuoTokenizer.from_pretrained(arguments.tokenizer).to(arguments.device)
    vae = open_vae(arguments.vae).to(arguments.device)
    require_latent_rate(vae, arguments.vae, tokenizer.frame_rate_hz)
    origin = ShardOrigin(
        track=track, tokenizer_fingerprint=str(tokenizer.fingerprint), vae_fingerprint=str(vae.fingerprint)
    )
    add_items(
        arguments.out,
        read_manifest(arguments.manifest),
        lambda item: encode_item(item, track, tokenizer, vae),
        origin,
        arguments.items_per_shard,
    )


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
