"""Drop the codes that training songs hardly use: nothing can be learned from so few examples of one.

What such a code stood for goes to the nearest code that stays. The codes are numbered anew, so tokens have to
be made again, by the pruned tokenizer.

Run: python -m duotok.recipes.tokenizer.prune --tokenizer runs/small/stage3/final \\
         --tokens data/tokens/train --out runs/small/pruned
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.tokenizer.model import DuoTokenizer

LEAST_SHARE = 0.25  # of what an even use of all codes would give each


def count_codes(tokens: str | Path, fingerprint: str) -> "dict[str, Tensor]":
    """Return {track: uses of each code [codes]} in token shards by the tokenizer of the fingerprint."""
    import torch

    from duotok.lm.metrics import code_counts
    from duotok.recipes.lm.tokens import TokenShards, check_tokens

    shards = TokenShards(tokens)
    check_tokens(shards, fingerprint)
    counts = {t: torch.zeros(size, dtype=torch.int64) for t, size in shards.index.codebook_sizes.items()}
    for song in shards.index.songs:
        for track, codes in shards.codes(song).items():
            counts[track] += code_counts(codes, len(counts[track]))
    return counts


def prune(
    tokenizer: "DuoTokenizer", counts: "Mapping[str, Tensor]", least_share: float = LEAST_SHARE
) -> "DuoTokenizer":
    """Return the tokenizer without the codes whose use (counts) is below least_share of an even share."""
    from duotok.tokenizer.model import DuoTokenizer

    if tokenizer.config.shared_codebook:
        raise ConfigError(
            "the tracks of this tokenizer share a codebook; only codebooks of one track are pruned"
        )
    if not 0 <= least_share < 1:
        raise ConfigError(f"the least share must be in [0, 1), got {least_share}")
    kept = {t: (n >= least_share * n.sum() / len(n)).nonzero()[:, 0] for t, n in counts.items()}
    sizes = {f"{track}_codes": len(codes) for track, codes in kept.items()}
    pruned = DuoTokenizer(replace(tokenizer.config, **sizes))
    weights = tokenizer.state_dict()
    for track, codes in kept.items():
        name = f"tracks.{track}.quantizer.basis"
        weights[name] = weights[name][codes]
    pruned.load_state_dict(weights)
    pruned.text = tokenizer.text
    return pruned.eval()


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Drop the codes that training songs hardly use")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the tokenizer of stage 3")
    parser.add_argument("--tokens", type=Path, required=True, help="token shards of training songs by it")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pruned tokenizer")
    told = f"codes below this share of even use are dropped (default: {LEAST_SHARE})"
    parser.add_argument("--least", type=float, default=LEAST_SHARE, metavar="SHARE", help=told)
    arguments = parser.parse_args(argv)

    def run() -> None:
        from duotok.tokenizer.model import DuoTokenizer

        tokenizer = DuoTokenizer.from_pretrained(arguments.tokenizer)
        counts = count_codes(arguments.tokens, str(tokenizer.fingerprint))
        pruned = prune(tokenizer, counts, arguments.least)
        pruned.save_pretrained(arguments.out)
        told = ", ".join(f"{t}: {pruned.codebook_size(t)} of {len(n)} codes" for t, n in counts.items())
        print(f"{arguments.out}: {told}")

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
