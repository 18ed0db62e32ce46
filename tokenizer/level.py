"""Bringing a recording to a standard level before it is tokenized, so that gain does not change tokens."""

import torch
from torch import Tensor
from torch.nn import functional

TARGET_RMS = 0.1
BLOCK_SAMPLES = 19_200  # 0.4 s


def level_gain(wave: Tensor) -> Tensor:
    """Return the gain [batch, 1] that brings the active parts of wave [batch, samples] to RMS 0.1.

    Active blocks are those within 30 dB of the loudest; a silent wave has gain 1.
    """
    padding = -wave.shape[-1] % BLOCK_SAMPLES
    blocks = functional.pad(wave, (0, padding)).unflatten(-1, (-1, BLOCK_SAMPLES))
    power = blocks.square().mean(dim=-1)  # [batch, blocks]
    active = power >= power.amax(dim=-1, keepdim=True) * 1e-3
    mean_power = (power * active).sum(dim=-1, keepdim=True) / active.sum(dim=-1, keepdim=True)
    gain = TARGET_RMS / mean_power.clamp_min(1e-12).sqrt()
    return torch.where(mean_power > 1e-10, gain, torch.ones_like(gain))
