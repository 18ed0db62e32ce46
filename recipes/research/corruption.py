"""What a damaged vocal costs the language model, in percent of its loss (P 6.1, eq. 8, figure 3).

The vocal is moved in time, hidden in part, or replaced by another song's. Two readings of every damage: over
whole windows after the paper's prefix of 2 s, and over the first 5 s without a prefix, where the
accompaniment's own past cannot yet tell key and tempo.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from duotok.lm.dual_track.model import DualTrackLM
from duotok.lm.dual_track.scoring import mask_source, score_batch, shift_source
from duotok.lm.metrics import corruption_cost_percent
from duotok.recipes.evaluation.lm_part import PREFIX_SECONDS, Windows, severity_figures

SHIFTS_SECONDS = (0.04, 0.08, 0.2, 0.5, 1.0, 2.0, 4.0, 8.0, 15.0)
MASK_SHARES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
START_SECONDS = 5.0
SCOPES = ("whole", "first_5s")
PAPER_MISMATCH_PERCENT = 17.3  # P 6.1, whole windows
_MODE, _TARGET = "vocal_to_accompaniment", "accompaniment"


@dataclass(frozen=True, kw_only=True)
class Cost:
    """How much a damage raises the loss."""

    percent: float
    error_percent: float  # standard error over windows, by the jackknife


Costs = Mapping[str, Cost]  # by scope


@dataclass(frozen=True, kw_only=True)
class Corruption:
    """The costs of every damage."""

    shifts: Mapping[float, Costs]  # by seconds
    masks: Mapping[float, Costs]  # by share of the frames
    mismatch: Costs
    windows: int
    seconds: float

    def figures(self) -> dict[str, float]:
        """Flat figures; of shifts and masks also those of `severity_figures`."""
        named = {f"shift_{round(1000 * seconds)}ms": costs for seconds, costs in self.shifts.items()}
        named |= {f"mask_{round(100 * share)}": costs for share, costs in self.masks.items()}
        named["mismatch"] = self.mismatch
        found: dict[str, float] = {"windows": self.windows, "window_seconds": self.seconds}
        for name, costs in named.items():
            for scope, suffix in zip(SCOPES, ("", "_first_5s"), strict=True):
                found[f"{name}_cost{suffix}_percent"] = costs[scope].percent
                found[f"{name}_cost{suffix}_error_percent"] = costs[scope].error_percent
        for kind, curve in (("shift", self.shifts), ("mask", self.masks)):
            for scope, suffix in zip(SCOPES, ("", "_first_5s"), strict=True):
                found |= severity_figures(
                    kind, suffix, [curve[amount][scope].percent for amount in sorted(curve)]
                )
        return found


def measure_corruption(lm: DualTrackLM, windows: Windows, seed: int = 0) -> Corruption:
    """Score all windows with the right vocal and with every damaged one."""
    vocal = windows.codes["vocal"]
    pad, rate_hz = lm.pads["vocal"], windows.rate_hz
    sources: dict[tuple[str, float], Tensor] = {("intact", 0.0): vocal}
    for seconds in (seconds for seconds in SHIFTS_SECONDS if seconds < windows.seconds):
        sources["shift", seconds] = shift_source(vocal, round(seconds * rate_hz))
    for share in MASK_SHARES:
        # The same draw for every share: what a small share hides, a larger one hides as well.
        sources["mask", share] = mask_source(vocal, share, pad, torch.Generator().manual_seed(seed))
    sources["mismatch", 0.0] = vocal[windows.partners]
    losses = {
        key: _losses(lm, shown, windows) for key, shown in tqdm(sources.items(), "corruption", disable=None)
    }
    intact = losses["intact", 0.0]
    costs = {
        key: {scope: relative_cost(found[scope], intact[scope]) for scope in SCOPES}
        for key, found in losses.items()
    }
    return Corruption(
        shifts={amount: cost for (kind, amount), cost in costs.items() if kind == "shift"},
        masks={amount: cost for (kind, amount), cost in costs.items() if kind == "mask"},
        mismatch=costs["mismatch", 0.0],
        windows=windows.count,
        seconds=windows.seconds,
    )


def relative_cost(damaged: Tensor, intact: Tensor) -> Cost:
    """Cost of a damage from each window's loss [windows], in any unit, with and without it."""
    percent = corruption_cost_percent(damaged.sum().item(), intact.sum().item())
    count = len(intact)
    if count < 2:
        return Cost(percent=percent, error_percent=0.0)
    without = 100 * ((damaged.sum() - damaged) / (intact.sum() - intact) - 1)  # each window left out once
    error = ((count - 1) / count * (without - without.mean()).square().sum()).sqrt()
    return Cost(percent=percent, error_percent=error.item())


def _losses(lm: DualTrackLM, vocal: Tensor, windows: Windows) -> dict[str, Tensor]:
    """Mean loss of each window [windows], in nats per token, by scope."""
    scores = score_batch(lm, vocal, windows.codes["accompaniment"], _MODE)
    nats = scores.loss_nats[_TARGET].double()
    prefix, start = (round(seconds * windows.rate_hz) for seconds in (PREFIX_SECONDS, START_SECONDS))
    return {"whole": nats[:, prefix:].mean(dim=1), "first_5s": nats[:, :start].mean(dim=1)}
