"""Solvers: all of them walk to where the exact differential equation ends, and bad settings are named."""

import pytest
import torch

from duotok.renderer.diffusion_path import AUTO, SOLVERS, DiffusionPath, SolverConfig, make_solver
from duotok.tokenizer.common.errors import ConfigError

ALL = [(objective, name) for objective, names in SOLVERS.items() for name in names]
all_solvers = pytest.mark.parametrize(("objective", "name"), ALL)


def walk(
    objective: str, deviation: float, mean: float = 0.5, **settings
) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise, and where the exact prediction for Gaussian latents leads it."""
    path = DiffusionPath(objective)
    noise = torch.randn(1, 1, 500, generator=torch.Generator().manual_seed(0))
    latents = noise
    solver = make_solver(objective, SolverConfig(**settings))
    for run, time in enumerate(solver.times):
        prediction = path.guess(latents, torch.tensor(mean), torch.tensor(deviation), time).offset
        latents = solver.step(prediction, run, latents)
    return noise, latents


@all_solvers
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_one_point_is_found_in_any_number_of_steps(objective, name, steps):
    _, latents = walk(objective, 1e-3, steps=steps, solver=name)
    assert torch.allclose(latents, torch.full_like(latents, 0.5), atol=0.01)


@all_solvers
def test_more_steps_end_nearer_at_the_exact_solution(objective, name):
    """Of Gaussian latents the exact end of the walk is mean + deviation * noise."""

    def error(steps: int) -> float:
        noise, latents = walk(objective, 0.3, steps=steps, solver=name)
        return float((latents - (0.5 + 0.3 * noise)).abs().mean())

    errors = [error(steps) for steps in (3, 9, 50)]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.015


@all_solvers
@pytest.mark.parametrize("steps", [1, 2, 3, 8, 50])
def test_steps_are_runs_of_the_network(objective, name, steps):
    times = make_solver(objective, SolverConfig(steps=steps, solver=name)).times
    assert len(times) == (2 * ((steps + 1) // 2) - 1 if name == "heun" else steps)
    assert 0 < times.min() and times.max() <= 1 and (times.diff() <= 0).all()


@pytest.mark.parametrize("name", SOLVERS["flow"])
def test_shift_spends_steps_near_the_noise_and_keeps_the_end(name):
    plain = make_solver("flow", SolverConfig(solver=name)).times
    shifted = make_solver("flow", SolverConfig(solver=name, shift=3.0)).times
    assert (shifted[1:] > plain[1:]).all()
    noise, latents = walk("flow", 0.3, steps=200, solver=name, shift=3.0)
    assert torch.allclose(latents, 0.5 + 0.3 * noise, atol=0.04)


def test_v_levels_are_those_of_the_solver():
    solver = make_solver("v", SolverConfig(steps=10))
    signal, _ = DiffusionPath("v").levels(solver.times.float())
    scheduler = solver._scheduler
    assert torch.allclose(signal, scheduler.alphas_cumprod[scheduler.timesteps].sqrt(), atol=1e-3)


def test_the_objective_chooses_its_solver():
    for objective, names in SOLVERS.items():
        own = make_solver(objective, SolverConfig(solver=AUTO))
        assert type(own._scheduler) is type(make_solver(objective, SolverConfig(solver=names[0]))._scheduler)


@pytest.mark.parametrize("settings", [{"steps": 0}, {"solver": "magic"}, {"shift": 0.0}, {"shift": 1000.0}])
def test_bad_settings_are_named(settings):
    with pytest.raises(ConfigError, match=next(iter(settings))):
        SolverConfig(**settings)


def test_what_an_objective_cannot_do_is_refused():
    with pytest.raises(ConfigError, match="solver 'heun'"):
        make_solver("v", SolverConfig(solver="heun"))
    with pytest.raises(ConfigError, match="shift must be 1"):
        make_solver("v", SolverConfig(shift=2.0))
