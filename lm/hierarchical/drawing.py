"""Sampling a stage's tokens for a whole song: guidance, key/value cache, windows that continue each other."""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional

from ..contract import SamplingConfig
from ..dual_track.sampling import next_window_start, pick_codes, threads
from .stage import KeyValueCache, Stage, lay_out


@torch.no_grad()
def draw_window(
    stage: Stage,
    source: Tensor,
    given: Tensor,
    frames: int,
    uniform: Tensor,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue `given` [candidates, levels, k] to `frames` frames; k < frames.

    source: [candidates, levels, source frames]; uniform: the numbers in [0, 1) that each token is drawn by
    [candidates, levels, frames]. progress is called with the number of tokens that were added.
    Returns codes [candidates, levels, frames] and the sums of the log-probabilities of the new ones, before
    temperature and truncation, with the source and, under guidance, without it [branches, candidates].
    """
    config, candidates = stage.config, len(given)
    levels, known_frames = given.shape[1:]
    branches = 1 + (sampling.guidance != 1.0)
    steps = levels * frames
    places = lay_out(config, source.shape[2], steps, source.device)
    heard = torch.arange(branches, device=source.device).repeat_interleave(candidates) == 0
    inputs = torch.cat(
        [stage.hear(source.repeat(branches, 1, 1), heard), stage.begin(given).repeat(branches, 1, 1)], dim=1
    )
    cache = KeyValueCache(config, len(inputs), len(places.order), inputs)
    begun = inputs.shape[1]
    # Of all steps at once, because making a step's own would cost as much as its layers.
    bias = stage.bias(places[begun:], places, inputs.dtype)
    hidden = stage.hidden_states(inputs, places[:begun], cache=cache)[:, -1]
    tokens = functional.pad(given.transpose(1, 2).flatten(1), (0, steps - levels * known_frames))
    draws = uniform.transpose(1, 2).flatten(1)
    nats = hidden.new_zeros(branches, candidates)
    for step in range(levels * known_frames, steps):
        level = step % levels
        logits = functional.linear(hidden, stage.head[level]).view(branches, candidates, -1)
        guided = logits[0]
        if branches > 1:  # without + guidance * (with - without)
            guided = torch.lerp(logits[1], guided, sampling.guidance)
        chosen = pick_codes(guided, draws[:, step], sampling)
        tokens[:, step] = chosen
        picked = logits.gather(2, chosen.expand(branches, -1)[..., None])[..., 0]
        nats += picked - logits.logsumexp(dim=-1)
        if progress is not None:
            progress(1)
        if step + 1 < steps:
            new = stage.target_embedding(chosen + level * config.target.codebook_size)
            row = cache.length - begun
            seen = bias[:, row : row + 1, : cache.length + 1]
            new = new.repeat(branches, 1)[:, None]
            hidden = stage.hidden_states(new, None, cache=cache, bias=seen)[:, -1]
    return tokens.unflatten(1, (frames, levels)).transpose(1, 2), nats


@torch.no_grad()
def draw_song(
    stage: Stage,
    source: Tensor,
    given: Tensor,
    frames: int,
    uniform: Tensor,
    sampling: SamplingConfig,
    progress: Callable[[int], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Continue `given` to `frames` frames by windows of the stage's own length; arguments as `draw_window`.

    Returns codes [candidates, levels, frames] and mean log-probabilities of the sampled ones in nats per
    token [branches, candidates].
    """
    config = stage.config
    source_hz, target_hz = config.source.rate_hz, config.target.rate_hz
    window = max(2, round(config.window_seconds * target_hz))
    overlap = min(window - 1, round(config.overlap_seconds * target_hz))
    plan = replace(sampling, window_frames=window, overlap_frames=overlap)
    done, first = given, given.shape[2]
    total = torch.zeros(1 + (sampling.guidance != 1.0), len(given), device=given.device)
    with threads(1):
        while done.shape[2] < frames:
            start = next_window_start(done.shape[2], frames, plan)
            stop = min(frames, start + window)
            heard = slice(
                int(start * source_hz / target_hz + 1e-6), config.source.frames((start + window) / target_hz)
            )
            codes, nats = draw_window(
                stage,
                source[:, :, heard],
                done[:, :, start:],
                stop - start,
                uniform[:, :, start:stop],
                sampling,
                progress,
            )
            done, total = torch.cat([done[:, :, :start], codes], dim=2), total + nats
    return done, total / max(1, config.target.levels * (frames - first))
