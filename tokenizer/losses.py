"""The losses of the loss table, one value per cut, and their means by kind of cut (P eq. 2, 3, 5)."""

import torch
from torch import Tensor
from torch.nn import functional

KINDS = ("mix", "vocal", "accompaniment", "instrumental")


def mel_distances(predicted: Tensor, target: Tensor) -> Tensor:
    """Return the L1 distance [batch] of normalized log-mels [batch, frames, bands]."""
    return (predicted.float() - target).abs().mean(dim=(1, 2))


def chroma_distances(logits: Tensor, target: Tensor) -> Tensor:
    """Return the cross-entropy [batch] of chroma in 0..1 [batch, frames, 12], less its entropy."""
    loss = functional.binary_cross_entropy_with_logits(logits.float(), target, reduction="none")
    entropy = functional.binary_cross_entropy(target, target, reduction="none")
    return (loss - entropy).mean(dim=(1, 2))


def mask_distances(logits: Tensor, target: Tensor) -> Tensor:
    """Return the L1 distance [batch] of soft masks [batch, frames, 4, bands] to their targets (P eq. 3)."""
    return (logits.float().softmax(dim=2) - target).abs().mean(dim=(1, 2, 3))


def text_losses(logits: Tensor, text: Tensor, span: Tensor) -> Tensor:
    """Return the CTC loss [batch] in nats per token; NaN where there is no text.

    logits [batch, frames, text_tokens], the last one the blank; text [runs, longest], -1 after its end; span
    [runs, 3], the cut's index and the first and after-last frame of each run. A text that does not fit into
    its frames counts as none. Runs shorter than the cut leave CTC fewer alignments to choose from.
    """
    cut, first, stop = span.unbind(dim=1)
    frames = stop.clamp_max(logits.shape[1]) - first
    steps = torch.arange(int(frames.max()), device=logits.device)
    places = (first[:, None] + steps).clamp_max(logits.shape[1] - 1)
    lengths = (text >= 0).sum(dim=1)
    losses = functional.ctc_loss(
        logits[cut[:, None], places].float().log_softmax(dim=-1).transpose(0, 1),
        text.clamp_min(0),
        frames,
        lengths,
        blank=logits.shape[-1] - 1,
        reduction="none",
        zero_infinity=True,
    )
    has_text = (lengths > 0) & (losses > 0)
    nothing = losses.new_zeros(len(logits))
    nats = nothing.index_add(0, cut, torch.where(has_text, losses, 0.0))
    tokens = nothing.index_add(0, cut, torch.where(has_text, lengths, 0).to(losses.dtype))
    return torch.where(tokens > 0, nats / tokens.clamp_min(1), torch.nan)


def summarize_by_kind(losses: dict[str, Tensor], kind: Tensor) -> dict[str, Tensor]:
    """Return {name: mean, "name/kind": mean over the cuts of that kind that it applies to}.

    losses: [batch] each, NaN where it does not apply; kind [batch] indexes KINDS. The mean of a loss that
    applies to no cut of the batch is 0.
    """
    summary = {}
    for name, values in losses.items():
        applies = values.isfinite()
        known = torch.where(applies, values, 0.0)
        summary[name] = known.sum() / applies.sum().clamp_min(1)
        for index, label in enumerate(KINDS):
            chosen = applies & (kind == index)
            if chosen.any():
                summary[f"{name}/{label}"] = known[chosen].mean().detach()
    return summary
