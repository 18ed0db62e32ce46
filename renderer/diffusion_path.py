"""The way from latents to noise: levels, what is predicted, the best Gaussian guess."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

OBJECTIVES = ("flow", "v")


class Guess(NamedTuple):
    """Skip connection of the network: prediction = offset + scale * network output."""

    offset: Tensor
    scale: Tensor


class DiffusionPath:
    """Noisy latents at time t in 0..1: signal(t) * latents + noise(t) * Gaussian noise.

    "flow": straight paths, the prediction is noise - latents (rectified flow, arXiv 2209.03003).
    "v": cosine schedule, the prediction is signal * noise - noise_level * latents (arXiv 2202.00512).
    """

    def __init__(self, objective: str) -> None:
        self.objective = objective

    def levels(self, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the signal and the noise level at time (any shape)."""
        if self.objective == "flow":
            return 1 - time, time
        # The cosine schedule of arXiv 2102.09672, as diffusers' "squaredcos_cap_v2" tabulates it.
        shift = 0.008
        angle = (time + shift) / (1 + shift) * (torch.pi / 2)
        signal = (angle.cos() / np.cos(shift / (1 + shift) * np.pi / 2)).clamp(1e-4, 1)
        return signal, (1 - signal**2).sqrt()

    def mix(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return the noisy latents; time broadcasts against latents."""
        signal, level = self.levels(time)
        return signal * latents + level * noise

    def target(self, latents: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Return what the network is to predict."""
        if self.objective == "flow":
            return noise - latents
        signal, level = self.levels(time)
        return signal * noise - level * latents

    def guess(self, noisy: Tensor, mean: Tensor, deviation: Tensor, time: Tensor) -> Guess:
        """Return the exact expectation and deviation of the target for latents ~ N(mean, deviation^2).

        With the posterior of a Gaussian prior, E[latents | noisy] is linear; the network then only has to
        learn what a Gaussian around the regression's mean cannot say (preconditioning as in arXiv 2206.00364,
        sec. 5, with a mean). scale is the deviation of the target around that expectation.
        """
        signal, level = self.levels(time)
        variance = deviation**2
        total = signal**2 * variance + level**2  # variance of noisy around signal * mean
        if self.objective == "flow":
            offset = (noisy * (level - signal * variance) - mean * level) / total
        else:
            offset = level * (noisy * signal * (1 - variance) - mean) / total
        return Guess(offset=offset, scale=deviation / total.sqrt())
