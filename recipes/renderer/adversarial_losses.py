"""Losses of waves against discriminators: least squares, and the matching of their features."""

from collections.abc import Sequence

import torch
from torch import Tensor

from duotok.renderer.discriminators import Judgement


def discriminator_loss(real: Sequence[Judgement], rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean squared error of the logits from 1 for recordings and 0 for rebuilt waves (2010.05646, eq. 1)."""
    losses = [
        (1 - r.logits.float()).square().mean() + f.logits.float().square().mean()
        for r, f in zip(real, rebuilt, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean squared error of the rebuilt waves' logits from 1 (2010.05646, eq. 2)."""
    return torch.stack([(1 - judged.logits.float()).square().mean() for judged in rebuilt]).mean()


def feature_matching_loss(real: Sequence[Judgement], rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean absolute difference of features over their mean size, mean over layers (EnCodec, 2210.13438, 3.4).

    The features of the recordings are constants: no gradient goes to them.
    """
    losses = []
    for r, f in zip(real, rebuilt, strict=True):
        for wanted, given in zip(r.features, f.features, strict=True):
            wanted = wanted.detach().float()
            losses.append((given.float() - wanted).abs().mean() / wanted.abs().mean().clamp_min(1e-6))
    return torch.stack(losses).mean()
