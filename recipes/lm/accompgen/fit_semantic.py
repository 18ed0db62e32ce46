"""Fit the semantic tokens of AccompGen: k-means on the states of a self-supervised encoder.

Run: python -m duotok.recipes.lm.accompgen.fit_semantic --encoder runs/small/stage1/final \\
         --manifest data/popband/train.jsonl --out runs/small/semantic
The encoder is a tokenizer folder of any stage (heard at 50 Hz), or a HubertModel of transformers, by its
folder or hub id (--hubert facebook/hubert-base-ls960 --layer 9). One codebook serves both tracks.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError

_EXCERPT_SECONDS = 10.0


def fit_semantic(
    *,
    encoder: Path | None,
    hubert: str | None,
    manifest: Path,
    out: Path,
    clusters: int,
    layer: int,
    frames: int,
    seed: int,
    device: str,
) -> Path:
    """Write a semantic tokenizer, fitted on about so many frames of random excerpts; return its folder."""
    import numpy as np
    import torch
    from tqdm import tqdm

    from duotok.recipes.corpus.manifest import read_manifest
    from duotok.tokenizer.model import TRACKS, DuoTokenizer
    from duotok.tokenizer.semantic import RATE_HZ, SemanticTokenizer, fit_centroids

    torch.manual_seed(seed)
    if hubert is not None:
        model = SemanticTokenizer.on_hubert(hubert, clusters=clusters, layer=layer)
    else:
        assert encoder is not None
        model = SemanticTokenizer.on_tokenizer(DuoTokenizer.from_pretrained(encoder), clusters=clusters)
    model.to(device)
    items, rng = read_manifest(manifest), np.random.default_rng(seed)
    if not items:
        raise DataError(f"{manifest} has no items")
    excerpts = max(1, round(frames / (len(TRACKS) * _EXCERPT_SECONDS * RATE_HZ)))
    found = []
    for number in tqdm(rng.permutation(np.arange(excerpts) % len(items)), desc="features", disable=None):
        item = items[int(number)]
        start = float(rng.uniform(0, max(0.0, item.seconds - _EXCERPT_SECONDS)))
        for track in TRACKS:
            wave = item.read(track, start_seconds=start, seconds=_EXCERPT_SECONDS)
            found.append(model.features(wave[None].to(device))[0].cpu())
    features = torch.cat(found)
    mean, deviation = features.mean(dim=0), features.std(dim=0).clamp_min(1e-5)
    centroids = fit_centroids((features - mean) / deviation, clusters, seed=seed)
    for name, values in (("mean", mean), ("deviation", deviation), ("centroids", centroids)):
        getattr(model, name).copy_(values)
    model.save_pretrained(out)
    return out


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program."""
    parser = argparse.ArgumentParser(description="Fit the semantic tokens of AccompGen")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--encoder", type=Path, metavar="DIR", help="tokenizer folder of any stage")
    source.add_argument("--hubert", metavar="DIR|ID", help="HubertModel of transformers instead")
    add = parser.add_argument
    add("--manifest", type=Path, required=True, help="JSONL manifest of the corpus")
    add("--out", type=Path, required=True, help="folder of the semantic tokenizer")
    add("--clusters", type=int, default=1024, help="codes (default: 1024)")
    add("--layer", type=int, default=-1, help="of HuBERT, 1 is the first (default: the last)")
    add("--frames", type=int, default=200_000, help="that are clustered (default: 200,000)")
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    arguments = parser.parse_args(argv)
    return guard(lambda: print(f"{fit_semantic(**vars(arguments))}"))


if __name__ == "__main__":
    sys.exit(main())
