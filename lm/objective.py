"""What training minimizes: cross-entropy of the target segment's codes after the prefix (P B.1)."""

import torch
from torch import Tensor, nn

from .layout import TRACKS, Layout
from .metrics import loss_nats
from .model import DualTrackLM


class LMObjective(nn.Module):
    """Teacher-forced loss of one batch of laid-out windows."""

    def __init__(self, lm: DualTrackLM) -> None:
        super().__init__()
        self.lm = lm

    def forward(
        self,
        *,
        vocal: Tensor,
        accompaniment: Tensor,
        segment: Tensor,
        position: Tensor,
        target_vocal: Tensor,
        target_accompaniment: Tensor,
        weight_vocal: Tensor,
        weight_accompaniment: Tensor,
    ) -> dict[str, Tensor]:
        """Return {"total", and nats per token of the predicted tracks}.

        The first four are a Layout [batch, steps]; targets and weights are [batch, frames]. Both heads take
        part in every batch, with weight zero where a track is given, so that distributed ranks stay in step.
        """
        layout = Layout(vocal, accompaniment, segment, position, target_vocal.shape[1])
        logits = self.lm(layout)
        targets = {"vocal": target_vocal, "accompaniment": target_accompaniment}
        weights = {"vocal": weight_vocal, "accompaniment": weight_accompaniment}
        sums = {t: (loss_nats(logits[t], targets[t]) * weights[t]).sum() for t in TRACKS}
        counts = {t: weights[t].sum() for t in TRACKS}
        means = {t: sums[t] / counts[t].clamp_min(1) for t in TRACKS}
        predicted = [t for t in TRACKS if counts[t] > 0]
        total = torch.stack([means[t] for t in TRACKS]).sum() / max(1, len(predicted))
        return {"total": total, **{f"{t}_nats": means[t] for t in predicted}}
