"""Writing the tracks' codes: greedily, with a key/value cache; a song by windows that are joined as codes."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from ...tokenizer.common.audio import SAMPLE_RATE_HZ
from ...tokenizer.common.errors import AudioError
from ..dual_track.sampling import threads
from .model import StepInputs, TokenSeparator, TokenSeparatorConfig


class _CachedBackbone:
    """The layers of a LlamaModel, a few steps at a time; keys and values in buffers made once."""

    def __init__(self, model: TokenSeparator, rows: int, steps: int) -> None:
        backbone, config = model.backbone, model.config
        self._backbone, self._heads = backbone, config.heads
        shape = (config.layers, rows, config.heads, steps, config.hidden_dim // config.heads)
        self._keys, self._values = (model.mix.new_zeros(shape) for _ in range(2))
        self._length = 0
        self._weights = [self._fuse(layer) for layer in backbone.layers]

    @staticmethod
    def _fuse(layer: Any) -> tuple[Tensor, Tensor]:
        attention, mlp = layer.self_attn, layer.mlp
        inputs = torch.cat([part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)])
        return inputs, torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])

    def advance(self, steps: StepInputs) -> Tensor:
        """Take the next steps: all of the prefix, then one at a time. Return the last one's state."""
        hidden, (rows, count) = steps.inputs, steps.inputs.shape[:2]
        end = self._length + count
        assert count == 1 or self._length == 0
        cosines, sines = self._backbone.rotary_emb(hidden, steps.positions[None])
        for number, layer in enumerate(self._backbone.layers):
            layer: Any
            attention_in, mlp_in = self._weights[number]
            qkv = functional.linear(layer.input_layernorm(hidden), attention_in)
            qkv = qkv.view(rows, count, 3, self._heads, -1).permute(2, 0, 3, 1, 4)
            query, key = _rotate(qkv[0], cosines, sines), _rotate(qkv[1], cosines, sines)
            keys, values = self._keys[number], self._values[number]
            keys[:, :, self._length : end], values[:, :, self._length : end] = key, qkv[2]
            mixed = functional.scaled_dot_product_attention(
                query, keys[:, :, :end], values[:, :, :end], is_causal=count > 1
            )
            hidden = hidden + layer.self_attn.o_proj(mixed.transpose(1, 2).flatten(2))
            gate, up = functional.linear(layer.post_attention_layernorm(hidden), mlp_in).chunk(2, dim=-1)
            hidden = hidden + layer.mlp.down_proj(functional.silu(gate) * up)
        self._length = end
        return self._backbone.norm(hidden[:, -1:])


def _rotate(values: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = values.chunk(2, dim=-1)
    return values * cosines + torch.cat([-second, first], dim=-1) * sines


@torch.no_grad()
def write_windows(
    model: TokenSeparator, waves: Tensor, progress: Callable[[int], None] | None = None
) -> Tensor:
    """Most likely codes [windows, tracks, rows, frames] of mono mixtures [windows, samples] of a window each.

    The model is in eval mode. progress is called with the number of steps done, each of all windows at once.
    """
    config, groups = model.config, model.config.groups
    if not config.sees_past:
        return _write_at_once(model, waves.to(model.device), progress)
    features = model.hear(waves.to(model.device))
    prefix, lanes = model.begin(features), model.lanes
    cache = _CachedBackbone(model, len(waves), prefix.inputs.shape[1] + model.sequences * (model.steps + 1))
    codes = torch.zeros(
        (len(waves), model.sequences, lanes, len(config.row_sizes), config.frames),
        dtype=torch.int64,
        device=model.device,
    )
    cache.advance(prefix)
    for sequence in range(model.sequences):
        heard = model.start.expand(len(waves), 1, -1)
        for step in range(model.steps):
            state = cache.advance(model.enter(heard, features, sequence, step))
            frame, group = divmod(step, len(groups))
            logits = model.predict(state[:, None], group)[..., 0, : config.row_sizes[groups[group][0]]]
            chosen = logits.argmax(dim=-1)  # [windows, lanes, rows]; E is not asked for, the length is known
            codes[:, sequence, :, groups[group].start : groups[group].stop, frame] = chosen
            heard = model.embed(chosen, group)[:, None]
            if progress is not None:
                progress(1)
        if sequence + 1 < model.sequences:
            cache.advance(model.enter(heard, features, sequence, model.steps))
    return codes.flatten(1, 2)


def _write_at_once(model: TokenSeparator, waves: Tensor, progress: Callable[[int], None] | None) -> Tensor:
    config = model.config
    shape = (len(waves), len(config.tracks), len(config.row_sizes), config.frames)
    told = model(waves, torch.zeros(shape, dtype=torch.int64, device=model.device))
    rows = [
        logits[..., : config.frames, : config.row_sizes[group[0]]].argmax(dim=-1)
        for logits, group in zip(told, config.groups, strict=True)
    ]
    if progress is not None:
        progress(model.sequences * model.steps)
    return torch.cat(rows, dim=2)


class Window(NamedTuple):
    """A window of a song, in frames of the codec."""

    start: int
    given: int  # the first frame that it gives: before it, the window before does


def plan_windows(config: TokenSeparatorConfig, frames: int) -> list[Window]:
    """Windows that cover a song of so many frames, a window or more; the last one ends where the song does.

    Neighbours change in the middle of what they share.
    """
    window, overlap = config.frames, int(config.overlap_seconds * config.codec.rate_hz)
    starts = [*range(0, frames - window, window - overlap), frames - window]
    changes = [start + (before + window - start) // 2 for before, start in pairwise(starts)]
    return [Window(start, given) for start, given in zip(starts, [0, *changes], strict=True)]


def write_song(
    model: TokenSeparator, wave: Tensor, *, rows: int = 8, progress: Callable[[float], None] | None = None
) -> Tensor:
    """Codes [tracks, rows, frames] of the tracks of a mono mixture [samples] at the standard level.

    rows: windows that are written at once. Neighbouring windows give way to each other in the middle of what
    they share: the joint lies in the codes, and the codec's decoder, which sees both sides, makes one sound
    of it. progress is called with the share that is done. Raises AudioError below a window.
    """
    config, samples = model.config, len(wave)
    frames = config.codec.frames(samples / SAMPLE_RATE_HZ)
    if samples < config.samples:
        raise AudioError(
            f"the mixture lasts {samples / SAMPLE_RATE_HZ:.2f} s, this separator hears "
            f"{config.samples / SAMPLE_RATE_HZ:g} s at once; give a longer one, or take another separator"
        )
    plan = plan_windows(config, frames)
    places = [round(window.start * SAMPLE_RATE_HZ / config.codec.rate_hz) for window in plan]
    wave = functional.pad(wave, (0, max(0, places[-1] + config.samples - samples)))
    codes = torch.zeros(
        len(config.tracks), len(config.row_sizes), frames, dtype=torch.int64, device=model.device
    )
    done, total = 0, model.sequences * model.steps * -(-len(plan) // rows)

    def tell(steps: int) -> None:
        nonlocal done
        done += steps
        if progress is not None:
            progress(done / total)

    with threads(1):
        for first in range(0, len(plan), rows):
            part = places[first : first + rows]
            windows = torch.stack([wave[place : place + config.samples] for place in part])
            for number, found in enumerate(write_windows(model, windows, tell), start=first):
                start, given = plan[number]
                codes[:, :, given : start + config.frames] = found[:, :, given - start :]
    return codes
