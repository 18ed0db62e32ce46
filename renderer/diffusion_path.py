"""The way between latents and noise: levels, targets, and the solver that walks it back in few steps."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..tokenizer.common.errors import ConfigError

OBJECTIVES = ("flow", "v")


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

    def guess(self, noisy: Tensor, mean: Tensor, deviation: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
        """Return the exact expectation and deviation of the target for latents ~ N(mean, deviation^2).

        The network's skip connection: prediction = expectation + deviation * output. With the posterior of a
        Gaussian prior, E[latents | noisy] is linear; the network only has to learn what a Gaussian around the
        regression's mean cannot say (preconditioning as in arXiv 2206.00364, sec. 5, with a mean).
        """
        signal, level = self.levels(time)
        variance = deviation**2
        total = signal**2 * variance + level**2  # variance of noisy around signal * mean
        if self.objective == "flow":
            offset = (noisy * (level - signal * variance) - mean * level) / total
        else:
            offset = level * (noisy * signal * (1 - variance) - mean) / total
        return offset, deviation / total.sqrt()

    def carry(
        self, noisy: Tensor, prediction: Tensor, mean: Tensor, deviation: Tensor, time: Tensor, later: Tensor
    ) -> Tensor:
        """Return what noisy latents at `time` become at a `later`, lower, time of straight paths.

        Euler's method for z = (noisy - signal * mean) / its deviation, which stands still for latents ~
        N(mean, deviation^2): a step errs only in what the network says beyond the guess. For the latents
        themselves (arXiv 2209.03003) eight steps lose 15 % of a Gaussian's deviation, and music its edges.
        """
        if self.objective != "flow":
            raise ConfigError("only straight paths are walked like this")
        offset, _ = self.guess(noisy, mean, deviation, time)
        (signal, level), (later_signal, later_level) = self.levels(time), self.levels(later)
        spread = (signal**2 * deviation**2 + level**2).sqrt()
        moved = (noisy - signal * mean) / spread + (later - time) * (prediction - offset) / spread
        return later_signal * mean + (later_signal**2 * deviation**2 + later_level**2).sqrt() * moved


TRAINING_STEPS = 1000  # resolution of the schedulers' time
# Times of flow matching are powers of evenly spaced ones: of few steps, short ones come late, where latents
# take their shape. Chosen on validation songs: docs/renderer.md.
_LATE = 1.8


class Solver:
    """One walk from noise to latents in so many runs of the network; the paper's reference is 50 (P C.4).

    Flow matching by `DiffusionPath.carry`; v by diffusers' DPM-Solver++ 2M.
    """

    def __init__(self, objective: str, steps: int) -> None:
        if steps < 1:
            raise ConfigError(f"steps must be at least 1, got {steps}")
        scheduler: Any = None
        if objective == "flow":
            times = torch.from_numpy(np.linspace(1, 1 / steps, steps) ** _LATE).float()
        else:
            from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

            scheduler = DPMSolverMultistepScheduler(
                num_train_timesteps=TRAINING_STEPS,
                beta_schedule="squaredcos_cap_v2",
                prediction_type="v_prediction",
                timestep_spacing="trailing",
                final_sigmas_type="zero",
            )
            scheduler.set_timesteps(steps)
            times = (scheduler.timesteps + 1) / TRAINING_STEPS  # entry i: the level after i + 1 steps
        self._path, self._scheduler = DiffusionPath(objective), scheduler
        self.times: Tensor = times  # [steps] in 0..1, falling: the time of each run of the network

    def step(self, prediction: Tensor, run: int, latents: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
        """Return the latents after a run of the network that predicted `prediction` from `latents`.

        mean, deviation: those of the guess, as in `DiffusionPath.guess`.
        """
        if self._scheduler is None:
            time, later = torch.cat([self.times, torch.zeros(1)])[run : run + 2].to(latents.device)
            moved = self._path.carry(latents.float(), prediction, mean, deviation, time, later)
            return moved.to(prediction.dtype)
        timestep = self._scheduler.timesteps[run]
        return self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]
