"""Reads the place in the bar and the chord of each frame from the model's states, in training only.

What a band plays follows from both, but next-code prediction alone is slow to find them in a voice: the last
codes of the band tell more at once. Asking for them by name is a short cut to states that know them.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional

BAR_PLACES = 16  # parts of a bar
CHORDS = 25  # twelve major, twelve minor, no chord
UNKNOWN = -1  # a frame whose label nobody knows


class ScoreReader(nn.Module):
    """Two linear heads on the states of the language model."""

    def __init__(self, hidden_dim: int) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(
            {"bar_place": nn.Linear(hidden_dim, BAR_PLACES), "chord": nn.Linear(hidden_dim, CHORDS)}
        )

    def forward(self, hidden: Tensor, labels: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return {"bar_place", "chord"}: nats per known frame, 0 where none is known.

        hidden [batch, steps, hidden_dim]: one segment of frames, or the prompt and the target one after the
        other. labels: {"bar_place", "chord"}, each [batch, frames], of both segments.
        """
        losses = {}
        for name, head in self.heads.items():
            logits = head(hidden).float()
            wanted = labels[name].repeat(1, logits.shape[1] // labels[name].shape[1])
            nats = functional.cross_entropy(
                logits.flatten(0, 1), wanted.flatten(), ignore_index=UNKNOWN, reduction="sum"
            )
            losses[name] = nats / torch.clamp((wanted != UNKNOWN).sum(), min=1)
        return losses
