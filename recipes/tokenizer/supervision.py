"""Cuts of several kinds as one batch, with the lyrics where they are supervised (P C.3)."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.tokenizer.cuts import Cut
from duotok.tokenizer.losses import KINDS
from duotok.tokenizer.text import TextVocabulary


def collate_cuts(
    cuts: Sequence[Cut],
    vocabulary: TextVocabulary | None,
    text_kinds: Sequence[str],
    text_coverage: float,
    rng: np.random.Generator,
) -> dict[str, Tensor]:
    """Return {"stems" [batch, 4, samples], "kind" [batch], "text" [batch, longest]} of cuts.

    text holds lyric tokens, -1 after their end; it is all -1 for cuts of other kinds than text_kinds and for
    a share 1 - text_coverage of the others.
    """
    covered = rng.random(len(cuts)) < text_coverage
    rows: list[list[int]] = []
    for cut, is_covered in zip(cuts, covered, strict=True):
        is_wanted = vocabulary is not None and is_covered and cut.kind in text_kinds
        rows.append(vocabulary.encode(cut.text) if vocabulary is not None and is_wanted else [])
    text = torch.full((len(cuts), max(1, *(len(row) for row in rows))), -1)
    for index, row in enumerate(rows):
        text[index, : len(row)] = torch.tensor(row, dtype=torch.int64)
    return {
        "stems": torch.stack([cut.stems for cut in cuts]),
        "kind": torch.tensor([KINDS.index(cut.kind) for cut in cuts]),
        "text": text,
    }
