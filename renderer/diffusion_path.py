"""The way between latents and noise: levels, targets, and the solvers that walk it back in few steps."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..tokenizer.common.errors import ConfigError

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


TRAINING_STEPS = 1000  # resolution of the schedulers' time
# By objective, the default first.
SOLVERS = {"flow": ("euler", "heun", "dpm", "unipc"), "v": ("dpm", "euler", "unipc")}
AUTO = "auto"


@dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """How noise becomes latents; the paper's reference is 50 steps (P C.4)."""

    steps: int = 8  # runs of the network; Heun's method, which runs it twice per step, makes at most as many
    solver: str = AUTO  # euler (DDIM under v), heun, dpm (DPM-Solver++ 2M), unipc; auto: the objective's own
    shift: float = 1.0  # flow only: above 1, more of the steps are near the noise (arXiv 2403.03206, 5.3)

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ConfigError(f"steps must be at least 1, got {self.steps}")
        known = (AUTO, *SOLVERS["flow"])
        if self.solver not in known:
            raise ConfigError(f"solver must be one of {', '.join(known)}, got {self.solver!r}")
        if not 0 < self.shift <= 100:
            raise ConfigError(f"shift must be above 0 and at most 100, got {self.shift}")


class Solver:
    """One walk from noise to latents."""

    def __init__(self, scheduler: Any, times: Tensor) -> None:
        self.times = times  # [runs] in 0..1, falling: the time of each run of the network
        self._scheduler = scheduler

    def step(self, prediction: Tensor, run: int, latents: Tensor) -> Tensor:
        """Return the latents after a run of the network that predicted `prediction` from `latents`."""
        timestep = self._scheduler.timesteps[run]
        return self._scheduler.step(prediction, timestep, latents, return_dict=False)[0]


def make_solver(objective: str, config: SolverConfig) -> Solver:
    """Return a fresh solver of an objective ("flow" or "v"); ConfigError where it has no such solver."""
    name = SOLVERS[objective][0] if config.solver == AUTO else config.solver
    if name not in SOLVERS[objective]:
        raise ConfigError(
            f"solver {name!r} does not fit a decoder of the objective {objective!r}; choose one of "
            f"{', '.join(SOLVERS[objective])}"
        )
    if objective == "v":
        if config.shift != 1:
            raise ConfigError(f"shift must be 1 for a decoder of the objective 'v', got {config.shift}")
        return _solver_of_v(name, config.steps)
    # Evenly spaced down to 1 / steps; the schedulers' default would waste the last step on a level of 0.001.
    steps = (config.steps + 1) // 2 if name == "heun" else config.steps
    levels = np.linspace(1, 1 / steps, steps)
    return _solver_of_flow(name, config.shift * levels / (1 + (config.shift - 1) * levels))


def _solver_of_flow(name: str, levels: np.ndarray) -> Solver:
    scheduler: Any
    if name == "euler":
        from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler

        scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=TRAINING_STEPS)
        scheduler.set_timesteps(sigmas=levels.tolist())
        return Solver(scheduler, scheduler.timesteps / TRAINING_STEPS)
    if name == "heun":
        from diffusers.schedulers.scheduling_flow_match_heun_discrete import FlowMatchHeunDiscreteScheduler

        scheduler = FlowMatchHeunDiscreteScheduler(num_train_timesteps=TRAINING_STEPS)
        scheduler.set_timesteps(len(levels))
        # It takes no levels of one's own: put them where it keeps its own.
        once = torch.from_numpy(levels).float()
        twice = torch.cat([once[:1], once[1:].repeat_interleave(2)])
        scheduler.timesteps, scheduler.sigmas = twice * TRAINING_STEPS, torch.cat([twice, torch.zeros(1)])
        return Solver(scheduler, twice)
    # Both work in the logarithm of the signal-to-noise ratio, which pure noise has not.
    levels[0] = 1 - min(1e-3, (1 - levels[1]) / 2 if len(levels) > 1 else 1)
    if name == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        scheduler = UniPCMultistepScheduler(
            num_train_timesteps=TRAINING_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        scheduler.set_timesteps(sigmas=levels.copy())
    else:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(
            num_train_timesteps=TRAINING_STEPS, prediction_type="flow_prediction", use_flow_sigmas=True
        )
        scheduler.set_timesteps(len(levels))
        scheduler.sigmas = torch.from_numpy(np.append(levels, 0)).float()
    scheduler.set_begin_index(0)  # otherwise found by the timestep, which may occur twice when rounded
    return Solver(scheduler, torch.from_numpy(levels).float())


def _solver_of_v(name: str, steps: int) -> Solver:
    settings: dict[str, Any] = {
        "num_train_timesteps": TRAINING_STEPS,
        "beta_schedule": "squaredcos_cap_v2",
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    scheduler: Any
    if name == "euler":
        from diffusers.schedulers.scheduling_ddim import DDIMScheduler

        scheduler = DDIMScheduler(**settings, clip_sample=False)
    elif name == "unipc":
        from diffusers.schedulers.scheduling_unipc_multistep import UniPCMultistepScheduler

        scheduler = UniPCMultistepScheduler(**settings, final_sigmas_type="zero")
    else:
        from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(**settings, final_sigmas_type="zero")
    scheduler.set_timesteps(steps)
    # diffusers' table: entry i is the level after i + 1 steps.
    return Solver(scheduler, (scheduler.timesteps + 1) / TRAINING_STEPS)
