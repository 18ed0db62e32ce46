"""What training minimizes: cross-entropy of the target segment's codes after the prefix (P B.1).

Under teacher forcing the target's own past is so telling that a model is slow to learn to listen. The prompt
steps have no past to lean on: there the same head may also predict the target's code of the same frame from
the source alone. That costs no further pass, and what the prompt learns of key, chords and beat is there for
the target to attend.
"""

import torch
from torch import Tensor, nn

from ..metrics import loss_nats
from .layout import TRACKS, Layout, mode_into
from .model import DualTrackLM


class LMObjective(nn.Module):
    """Teacher-forced loss of one batch of laid-out windows."""

    def __init__(self, lm: DualTrackLM, prompt_weight: float = 0.0) -> None:
        """prompt_weight: of the loss of the prompt steps; the paper has none."""
        super().__init__()
        self.lm, self.prompt_weight = lm, prompt_weight

    def forward(
        self,
        *,
        vocal: Tensor,
        accompaniment: Tensor,
        segment: Tensor,
        position: Tensor,
        sheet: Tensor,
        target_vocal: Tensor,
        target_accompaniment: Tensor,
        weight_vocal: Tensor,
        weight_accompaniment: Tensor,
    ) -> dict[str, Tensor]:
        """Return {"total", and nats per token of the predicted tracks, and of them in the prompt}.

        Tracks are named twice, "vocal_nats" and by the task "vocal_nats/unconditional", so that means over
        batches of several tasks can be told apart. The first five are a Layout [batch, steps]; targets and
        weights are [batch, frames]. Both heads take part in every batch, with weight zero where a track is
        given, so that distributed ranks stay in step.
        """
        frames = target_vocal.shape[1]
        hidden = self.lm.hidden_states(Layout(vocal, accompaniment, segment, position, sheet, frames))
        targets = {"vocal": target_vocal, "accompaniment": target_accompaniment}
        weights = {"vocal": weight_vocal, "accompaniment": weight_accompaniment}
        logits = self.lm.predict(hidden[:, -frames:])
        sums = {t: (loss_nats(logits[t], targets[t]) * weights[t]).sum() for t in TRACKS}
        counts = {t: weights[t].sum() for t in TRACKS}
        means = {t: sums[t] / counts[t].clamp_min(1) for t in TRACKS}
        predicted = [t for t in TRACKS if counts[t] > 0]
        total = torch.stack([means[t] for t in TRACKS]).sum() / max(1, len(predicted))
        losses = {f"{t}_nats": means[t] for t in predicted}
        if predicted:
            task = "unconditional" if hidden.shape[1] == frames else mode_into(predicted[0])
            losses |= {f"{t}_nats/{task}": means[t] for t in predicted}
        if self.prompt_weight and hidden.shape[1] > frames:
            prompt = {t: self.lm.codes_of(t).logits(hidden[:, :frames]) for t in predicted}
            alone = {f"{t}_prompt_nats": loss_nats(prompt[t], targets[t]).mean() for t in predicted}
            total = total + self.prompt_weight * torch.stack(list(alone.values())).mean()
            losses |= alone
        return {"total": total, **losses}
