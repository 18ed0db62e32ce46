"""The read-outs of stages 2 and 3: mel, chroma, lyrics and soft masks of four stems (P 3.2, 3.3)."""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .blocks import UpsamplingHead

STEMS = ("vocal", "drums", "bass", "other")
MASKS_PER_FRAME = 2


class HeadOutputs(NamedTuple):
    """What the heads say of frames after the bottleneck; None where the tokenizer has no such head."""

    mel: Tensor  # [batch, 4 * frames, mel_bands], normalized
    chroma_logits: Tensor  # [batch, 2 * frames, 12]
    text_logits: Tensor | None  # [batch, frames, text_tokens], the last one is the blank
    mask_logits: Tensor | None  # [batch, 2 * frames, 4, mel_bands], softmax over the stems


class TextHead(nn.Linear):
    """Lyric tokens and, last, the blank (P 3.2).

    A new one says blank with 0.9: as CTC spends most frames on blanks, a uniform start would have hundreds of
    steps go into nothing but that.
    """

    def __init__(self, dim: int, tokens: int) -> None:
        super().__init__(dim, tokens)
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)
        with torch.no_grad():
            self.bias[-1] = math.log(9 * max(1, tokens - 1))


class MaskHead(nn.Module):
    """Soft masks of four stems per mel band at 50 Hz; they sum to 1 over the stems (P eq. 3)."""

    def __init__(self, dim: int, hidden: int, bands: int) -> None:
        super().__init__()
        self.upsample = UpsamplingHead(dim, hidden, len(STEMS) * bands, doublings=1)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> logits [batch, 2 * frames, 4, bands]."""
        return self.upsample(features).unflatten(-1, (len(STEMS), -1))


def ideal_ratio_masks(stem_power: Tensor) -> Tensor:
    """Return the share of each stem in the power: [..., 4, bands], equal shares where all is silent."""
    power = stem_power + 1e-10
    return power / power.sum(dim=-2, keepdim=True)
