"""Teacher forcing: what training minimizes, scores of whole windows, and the damaged sources of P 6.1."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..metrics import accuracy_at, loss_nats, nats_to_bits, target_ranks
from .layout import MODES, TRACKS, Layout, check_mode, mode_into
from .model import DualTrackLM, TrackCodes

LARGEST_LOGITS = 2**25  # of one part of the loss: 1,024 tokens of 32,768 codes, 134 MB in fp32


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
    lm: DualTrackLM, vocal: Tensor, accompaniment: Tensor, mode: str, prefix_frames: int = 0, *, rows: int = 8
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
    joined = [{track: torch.cat(values) for track, values in each.items()} for each in (losses, ranks)]
    return Scores(loss_nats=joined[0], ranks=joined[1], prefix_frames=prefix_frames)


def shift_source(codes: Tensor, frames: int) -> Tensor:
    """Return codes [batch, frames] moved later in time, round the window's end (P 6.1, temporal shift)."""
    return codes.roll(frames, dims=1)


def mask_source(codes: Tensor, share: float, pad: int, generator: torch.Generator) -> Tensor:
    """Return codes with a random share of the frames replaced by PAD (P 6.1, random masking)."""
    hidden = torch.rand(codes.shape, generator=generator) < share
    return torch.where(hidden.to(codes.device), pad, codes)


def count_loss_parts(tokens: int, codes: int) -> int:
    """Return in how many parts the loss of so many tokens is computed, that none has many logits."""
    return max(1, -(-tokens * codes // LARGEST_LOGITS))


def target_nats(head: TrackCodes, hidden: Tensor, targets: Tensor, parts: int = 1) -> Tensor:
    """Return the cross-entropy [batch, frames] in nats of states [batch, frames, hidden_dim] on targets.

    In several parts no logits are kept for the backward pass, which computes them again, part by part.
    """
    if parts == 1:
        return loss_nats(head.logits(hidden), targets)

    def part_nats(hidden: Tensor, targets: Tensor) -> Tensor:
        return loss_nats(head.logits(hidden)[None], targets[None])[0]

    pairs = zip(hidden.flatten(0, 1).tensor_split(parts), targets.flatten().tensor_split(parts), strict=True)
    return torch.cat([checkpoint(part_nats, *pair, use_reentrant=False) for pair in pairs]).view_as(targets)


class LMObjective(nn.Module):
    """Cross-entropy of the target segment's codes of one batch of laid-out windows (P B.1).

    Under teacher forcing the target's own past is so telling that a model is slow to learn to listen. The
    prompt steps have no past to lean on: there the same head may also predict the target's code of the same
    frame from the source alone. That costs no further pass, and what the prompt learns of key, chords and
    beat is there for the target to attend.
    """

    def __init__(self, lm: DualTrackLM, prompt_weight: float = 0.0, loss_parts: int = 1) -> None:
        """prompt_weight: of the loss of the prompt steps; the paper has none. loss_parts: see `target_nats`.

        The parts are as many in every batch, because under ZeRO 3 all processes must meet at each of them.
        """
        super().__init__()
        self.lm, self.prompt_weight, self.loss_parts = lm, prompt_weight, loss_parts

    def forward(self, **batch: Tensor) -> dict[str, Tensor]:
        """Return {"total", and nats per token of the predicted tracks, and of them in the prompt}.

        Tracks are named twice, "vocal_nats" and by the task "vocal_nats/unconditional", so that means over
        batches of several tasks can be told apart. batch: the tensors of a Layout by their names, and of each
        track "target_" and "weight_", [batch, frames].
        """
        frames = batch["target_vocal"].shape[1]
        hidden = self.lm.hidden_states(Layout(**{n: batch[n] for n in Layout._fields[:-1]}, frames=frames))
        targets, weights = ({t: batch[f"{name}_{t}"] for t in TRACKS} for name in ("target", "weight"))
        counts = {t: weights[t].sum() for t in TRACKS}
        predicted = [t for t in TRACKS if counts[t] > 0]
        means = {}
        for track in TRACKS:
            # A head that predicts nothing is called with nothing, so that distributed ranks stay in step.
            judged = slice(-frames, None) if track in predicted else slice(0)
            nats = self._nats(track, hidden[:, judged], targets[track][:, judged])
            means[track] = (nats * weights[track][:, judged]).sum() / counts[track].clamp_min(1)
        total = torch.stack([means[t] for t in TRACKS]).sum() / max(1, len(predicted))
        losses = {f"{t}_nats": means[t] for t in predicted}
        if predicted:
            task = "unconditional" if hidden.shape[1] == frames else mode_into(predicted[0])
            losses |= {f"{t}_nats/{task}": means[t] for t in predicted}
        if self.prompt_weight and hidden.shape[1] > frames:
            alone = {
                f"{t}_prompt_nats": self._nats(t, hidden[:, :frames], targets[t]).mean() for t in predicted
            }
            total = total + self.prompt_weight * torch.stack(list(alone.values())).mean()
            losses |= alone
        return {"total": total, **losses}

    def _nats(self, track: str, hidden: Tensor, targets: Tensor) -> Tensor:
        return target_nats(self.lm.codes_of(track), hidden, targets, self.loss_parts)
