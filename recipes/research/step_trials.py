"""The trials of `steps`: decoders, solvers and numbers of steps, each heard on the same excerpts."""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from duotok.recipes.evaluation.excerpts import Excerpt
from duotok.recipes.evaluation.sound_quality import measure_quality
from duotok.renderer.autoencoder import Autoencoder
from duotok.renderer.diffusion import DiffusionDecoder
from duotok.renderer.diffusion_path import AUTO, SolverConfig, make_solver
from duotok.renderer.renderer import Renderer
from duotok.tokenizer.common.audio import SAMPLE_RATE_HZ
from duotok.tokenizer.common.errors import ConfigError
from duotok.tokenizer.model import DuoTokenizer


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One way to draw latents."""

    decoder: str  # its name in the table
    steps: int
    solver: str = AUTO
    shift: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Heard:
    """One excerpt, and what the decoder is told of it."""

    wave: Tensor  # [2, samples]
    features: Tensor  # [frames25, dim]


def parse_schedule(text: str) -> tuple[str, float]:
    """("euler", 0.5) of "euler:0.5"; a solver alone has shift 1."""
    solver, _, shift = text.partition(":")
    try:
        config = SolverConfig(solver=solver, shift=float(shift or 1))
    except ValueError as error:
        raise ConfigError(f"schedule {text!r} must look like euler or euler:0.5") from error
    return config.solver, config.shift


def plan_trials(
    decoders: dict[str, DiffusionDecoder], schedules: Sequence[str], steps: Sequence[int]
) -> list[Trial]:
    """Every decoder with every schedule that its objective knows and every number of steps."""
    trials = []
    for name, decoder in decoders.items():
        for solver, shift in map(parse_schedule, schedules):
            for count in steps:
                config = SolverConfig(steps=count, solver=solver, shift=shift)
                try:
                    make_solver(decoder.config.objective, config)
                except ConfigError:
                    if len(decoders) == 1:
                        raise
                    continue  # of several decoders one may have another objective
                trials.append(Trial(decoder=name, steps=count, solver=solver, shift=shift))
    return trials


def hear(excerpts: Sequence[Excerpt], tokenizer: DuoTokenizer, track: str) -> list[Heard]:
    """Read the excerpts and encode them."""
    heard = []
    for excerpt in excerpts:
        wave = excerpt.read(track)
        codes = tokenizer.encode(wave[None], track)
        heard.append(Heard(wave=wave, features=tokenizer.features(codes, track)[0]))
    return heard


@torch.no_grad()
def run_trial(
    trial: Trial,
    heard: Sequence[Heard],
    vae: Autoencoder,
    decoder: DiffusionDecoder,
    *,
    track: str,
    guidance: float,
    seed: int,
) -> dict[str, Any]:
    """The trial's settings, its figures of quality (means over excerpts) and its seconds per second."""
    renderer = Renderer(vae, {track: decoder})
    rows, wall, processor, sounding, audio = [], 0.0, 0.0, 0.0, 0.0
    for number, excerpt in enumerate(heard):
        samples = excerpt.wave.shape[-1]
        began, began_processor = time.perf_counter(), time.process_time()
        latents = renderer.render_latents(
            excerpt.features,
            steps=trial.steps,
            guidance=guidance,
            seed=seed + number,
            track=track,
            solver=trial.solver,
            shift=trial.shift,
        )
        drawn = time.perf_counter()
        wall, processor = wall + drawn - began, processor + time.process_time() - began_processor
        rendered = renderer.decode(latents, samples)
        sounding += time.perf_counter() - drawn
        audio += samples / SAMPLE_RATE_HZ
        rows.append(measure_quality(excerpt.wave, rendered))
    runs = len(
        make_solver(
            decoder.config.objective,
            SolverConfig(steps=trial.steps, solver=trial.solver, shift=trial.shift),
        ).times
    )
    return {
        **asdict(trial),
        "objective": decoder.config.objective,
        "network_runs": runs,
        **{name: float(np.mean([row[name] for row in rows])) for name in rows[0]},
        "diffusion_seconds_per_second": wall / audio,
        "diffusion_processor_seconds_per_second": processor / audio,
        "vae_seconds_per_second": sounding / audio,
    }
