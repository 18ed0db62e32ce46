"""Take a trained language model over to another tokenizer.

What the layers know of music does not depend on which code stands for which sound; only the tables of codes
do. Each new code begins as the mean of the old codes that stand for the same frames of the same recordings,
weighted by how often they do; training then goes on with `start_from`.

Run: python -m duotok.recipes.lm.transplant --lm runs/small/lm/final --old-tokens data/tokens/train \
         --tokens data/tokens-new/train --tokenizer runs/new/stage3/final --out runs/new/lm-start
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from duotok.tokenizer.common.command import guard
from duotok.tokenizer.common.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.lm.dual_track.model import DualTrackLM, TrackCodes
    from duotok.lm.sheet.reader import SheetReader
    from duotok.recipes.lm.token_shards import TokenShards
    from duotok.tokenizer.model import DuoTokenizer

RIDGE = 1e-3  # of the fit by code vectors, relative to their mean square


def transplant(
    lm: "DualTrackLM",
    old: "TokenShards",
    new: "TokenShards",
    tokenizer: "DuoTokenizer",
    sheet_reader: "SheetReader | None" = None,
) -> "DualTrackLM":
    """Return the model for another tokenizer; old and new: tokens of the same recordings by each of them.

    sheet_reader: of the new codes; a model that plays from lead sheets needs one.
    """
    import torch

    from duotok.lm.dual_track.layout import TRACKS
    from duotok.lm.dual_track.model import DualTrackLM

    check_tokens(old, str(lm.tokenizer_fingerprint))
    check_tokens(new, str(tokenizer.fingerprint))
    if lm.sheet_reader is not None and sheet_reader is None:
        raise DataError("this model reads lead sheets; train a sheet reader on the new tokens and name it")
    counts = count_together(old, new)
    moved = DualTrackLM.for_tokenizer(tokenizer, replace(lm.config, sheet_reader=None))
    if sheet_reader is not None:
        moved.add_sheet_reader(sheet_reader)
    bound = ("tracks.", "sheet_reader.")  # to the old codes
    tables = {name: value for name, value in lm.state_dict().items() if not name.startswith(bound)}
    moved.load_state_dict(tables, strict=False)
    with torch.no_grad():
        for track in TRACKS:
            move_codes(lm.codes_of(track), moved.codes_of(track), counts[track].double())
    return moved


def check_tokens(shards: "TokenShards", fingerprint: str) -> None:
    """Raise DataError unless the tokens were made by the tokenizer of that fingerprint."""
    if shards.index.tokenizer_fingerprint != fingerprint:
        raise DataError(
            f"the tokens in {shards.folder} were made by the tokenizer {shards.index.tokenizer_fingerprint}, "
            f"not by {fingerprint}; make them again"
        )


def count_together(old: "TokenShards", new: "TokenShards") -> dict[str, "Tensor"]:
    """Return {track: counts [new codes, old codes]} of frames, over the recordings that both have."""
    import torch

    known = {song.id: song for song in old.index.songs}
    shared = [(known[song.id], song) for song in new.index.songs if song.id in known]
    if not shared or old.index.frame_rate_hz != new.index.frame_rate_hz:
        raise DataError(f"{old.folder} and {new.folder} have no recording at one frame rate in common")
    counts = {
        track: torch.zeros(size, old.index.codebook_sizes[track])
        for track, size in new.index.codebook_sizes.items()
    }
    for before, after in shared:
        frames = min(before.frames, after.frames)
        pairs = (old.codes(before, 0, frames), new.codes(after, 0, frames))
        for track, table in counts.items():
            one = torch.ones(frames)
            table.index_put_((pairs[1][track], pairs[0][track]), one, accumulate=True)
    return counts


def move_codes(old: "TrackCodes", new: "TrackCodes", counts: "Tensor") -> None:
    """Fill the tables of a track; counts [new codes, old codes] float64.

    A new code that was never met is as the met one nearest to it. As much of the tables as the code vectors
    explain goes into the anchors, the rest into the residuals.
    """
    import torch

    met = counts.sum(dim=1) > 0
    nearest = torch.cdist(new.vectors, new.vectors[met]).argmin(dim=1)
    counts = counts[met][nearest]
    share = (counts / counts.sum(dim=1, keepdim=True)).float()

    embedded = old.embed(torch.arange(old.codes + 1))
    wanted = share @ embedded[:-1]
    anchor, rest = _explain(wanted, new.vectors)
    new.anchor_in.weight.copy_(anchor.T)
    new.residual_in.weight.copy_(torch.cat([rest, embedded[-1:]]))

    wanted = share @ (old.vectors @ old.anchor_out.weight + old.residual_out.weight)
    anchor, rest = _explain(wanted, new.vectors)
    new.anchor_out.weight.copy_(anchor)
    new.residual_out.weight.copy_(rest)
    # The bias stands for how frequent a code is; its mean over old codes is that of their frequencies.
    logs_old, logs_new = (torch.log(counts.sum(dim=axis).clamp_min(0.5)).float() for axis in (0, 1))
    new.residual_out.bias.copy_(share @ (old.residual_out.bias - logs_old) + logs_new)


def _explain(wanted: "Tensor", vectors: "Tensor") -> tuple["Tensor", "Tensor"]:
    """Return the map [code_dim, width] with vectors @ map near wanted [codes, width], and what it leaves."""
    import torch

    gram = vectors.T @ vectors
    gram = gram + RIDGE * gram.diagonal().mean() * torch.eye(len(gram))
    anchor = torch.linalg.solve(gram, vectors.T @ wanted)
    return anchor, wanted - vectors @ anchor


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(description="Take a language model over to another tokenizer")
    parser.add_argument("--lm", type=Path, required=True, help="folder of the trained language model")
    parser.add_argument("--old-tokens", type=Path, required=True, help="token shards by its own tokenizer")
    parser.add_argument("--tokens", type=Path, required=True, help="of the same recordings, by the new one")
    parser.add_argument("--tokenizer", type=Path, required=True, help="folder of the new tokenizer")
    parser.add_argument(
        "--sheet-reader", type=Path, help="sheet reader of the new tokens, for a model that plays from sheets"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for the model to start from")
    arguments = parser.parse_args(argv)

    def run() -> None:
        from duotok.lm.dual_track.model import DualTrackLM
        from duotok.lm.sheet.reader import SheetReader
        from duotok.recipes.lm.token_shards import TokenShards
        from duotok.tokenizer.model import DuoTokenizer

        moved = transplant(
            DualTrackLM.from_pretrained(arguments.lm),
            TokenShards(arguments.old_tokens),
            TokenShards(arguments.tokens),
            DuoTokenizer.from_pretrained(arguments.tokenizer),
            SheetReader.from_pretrained(arguments.sheet_reader) if arguments.sheet_reader else None,
        )
        moved.save_pretrained(arguments.out)
        print(f"{arguments.out}: a language model for {arguments.tokenizer}; train it with start_from")

    return guard(run)


if __name__ == "__main__":
    sys.exit(main())
