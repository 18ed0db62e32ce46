"""Losses between what makes sound and the discriminators that tell it from recordings (arXiv 2010.05646)."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call

_TINY = 1e-6


class Judgement(NamedTuple):
    """What one discriminator says of a batch."""

    logits: Tensor  # [batch, 1, ...]; trained towards 1 for recordings, 0 for what is rebuilt
    features: list[Tensor]  # the activations of each layer before, [batch, channels, ...]


def contest(
    discriminators: nn.Module, found: Tensor, real: Tensor, matched: int | None = None
) -> dict[str, Tensor]:
    """Return the losses "adversarial" and "feature_matching" of who found, and "discriminator" of the others.

    discriminators: a batch -> Judgements; found: what is made in place of each example of the real batch, of
    which the first `matched` (None: all) are rebuilt and are to be alike. By the first two losses no
    discriminator learns, by the third no one else.
    """
    true = discriminators(real)
    frozen = {name: weight.detach() for name, weight in discriminators.named_parameters()}
    judged = functional_call(discriminators, frozen, (found,))
    return {
        "adversarial": adversarial_loss(judged),
        "feature_matching": feature_matching_loss(_first(true, matched), _first(judged, matched)),
        "discriminator": discriminator_loss(true, discriminators(found.detach())),
    }


def _first(judgements: Sequence[Judgement], count: int | None) -> list[Judgement]:
    return [Judgement(each.logits[:count], [seen[:count] for seen in each.features]) for each in judgements]


def discriminator_loss(real: Sequence[Judgement], rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean squared error of the logits from 1 for recordings and 0 for what is rebuilt (eq. 1)."""
    losses = [
        (1 - r.logits.float()).square().mean() + f.logits.float().square().mean()
        for r, f in zip(real, rebuilt, strict=True)
    ]
    return torch.stack(losses).mean()


def adversarial_loss(rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean squared error of the logits of what is rebuilt from 1 (eq. 2)."""
    return torch.stack([(1 - judged.logits.float()).square().mean() for judged in rebuilt]).mean()


def feature_matching_loss(real: Sequence[Judgement], rebuilt: Sequence[Judgement]) -> Tensor:
    """Mean difference of features over their mean size (EnCodec, 2210.13438, 3.4); real: constants."""
    losses = []
    for r, f in zip(real, rebuilt, strict=True):
        for wanted, given in zip(r.features, f.features, strict=True):
            wanted = wanted.detach().float()
            losses.append((given.float() - wanted).abs().mean() / wanted.abs().mean().clamp_min(_TINY))
    return torch.stack(losses).mean()
