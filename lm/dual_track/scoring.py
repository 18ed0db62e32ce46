"""Teacher-forced scores of whole windows, frame by frame, and the damaged sources of P 6.1."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics import accuracy_at, loss_nats, nats_to_bits, target_ranks
from .layout import MODES, check_mode
from .model import DualTrackLM


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Losses and ranks of the predicted tracks, [batch, frames]; the first prefix_frames do not count."""

    loss_nats: dict[str, Tensor]
    ranks: dict[str, Tensor]
    prefix_frames: int

    def bits_per_token(self, track: str, first_frames: int | None = None) -> float:
        """Return mean bits per token of a track, over all scored frames or only the first so many of them."""
        return nats_to_bits(self._counted(self.loss_nats[track], first_frames).double().mean().item())

    def accuracy_at(self, track: str, k: int, first_frames: int | None = None) -> float:
        """Return Acc@k of a track."""
        return accuracy_at(self._counted(self.ranks[track], first_frames), k)

    def _counted(self, values: Tensor, first_frames: int | None) -> Tensor:
        stop = None if first_frames is None else self.prefix_frames + first_frames
        return values[:, self.prefix_frames : stop]


@torch.no_grad()
def score_batch(
    lm: DualTrackLM,
    vocal: Tensor,
    accompaniment: Tensor,
    mode: str,
    prefix_frames: int = 0,
    *,
    rows: int = 8,
) -> Scores:
    """Score windows under teacher forcing (P B.1.3, B.1.4); the paper's prefix is 50 frames.

    vocal, accompaniment: codes [batch, frames]. The source track may be another song's (mismatch) or hold PAD
    (`lm.pads`) where it is masked. rows: windows computed at a time.
    """
    check_mode(mode)
    targets = MODES[mode][1]
    codes = {"vocal": vocal.to(lm.device), "accompaniment": accompaniment.to(lm.device)}
    losses: dict[str, list[Tensor]] = {track: [] for track in targets}
    ranks: dict[str, list[Tensor]] = {track: [] for track in targets}
    for first in range(0, len(vocal), rows):
        part = {track: c[first : first + rows] for track, c in codes.items()}
        layout = lm.lay_out(part, mode)
        hidden = lm.hidden_states(layout)[:, -layout.frames :]
        for track in targets:  # one after the other: logits are the largest tensors there are
            logits = lm.codes_of(track).logits(hidden)
            losses[track].append(loss_nats(logits, part[track]).cpu())
            ranks[track].append(target_ranks(logits, part[track]).cpu())
    return Scores(
        loss_nats={track: torch.cat(values) for track, values in losses.items()},
        ranks={track: torch.cat(values) for track, values in ranks.items()},
        prefix_frames=prefix_frames,
    )


def shift_source(codes: Tensor, frames: int) -> Tensor:
    """Return codes [batch, frames] moved later in time, round the window's end (P 6.1, temporal shift)."""
    return codes.roll(frames, dims=1)


def mask_source(codes: Tensor, share: float, pad: int, generator: torch.Generator) -> Tensor:
    """Return codes with a random share of the frames replaced by PAD (P 6.1, random masking)."""
    hidden = torch.rand(codes.shape, generator=generator) < share
    return torch.where(hidden.to(codes.device), pad, codes)


def mismatch_source(codes: Tensor) -> Tensor:
    """Return the codes of the next row in place of each row's own (P 6.1, mismatch); rows are songs."""
    return codes.roll(1, dims=0)
