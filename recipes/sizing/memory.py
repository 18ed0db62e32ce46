"""Bytes per device: weights, gradients and optimizer under ZeRO, and what the backward pass keeps."""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import init_empty_weights
from torch import Tensor, nn

from duotok.recipes.sizing.dry_recipe import DryRecipe, Scale
from duotok.tokenizer.common.errors import ConfigError

ZERO_STAGES = (0, 1, 2, 3)
MEASURED_SECONDS = 2.0
MEASURED_BATCHES = (2, 4)  # two examples at least: stage 3 takes one of each track
MEASURED_BLOCKS = (1, 2)


@dataclass(frozen=True, kw_only=True)
class PartSize:
    """Parameters of one part of a model, and bytes of its buffers."""

    trainable: int = 0
    frozen: int = 0
    buffer_bytes: int = 0

    def __add__(self, other: "PartSize") -> "PartSize":
        return PartSize(
            trainable=self.trainable + other.trainable,
            frozen=self.frozen + other.frozen,
            buffer_bytes=self.buffer_bytes + other.buffer_bytes,
        )


@dataclass(frozen=True, kw_only=True)
class StateBytes:
    """What a device holds between steps."""

    weights: float
    gradients: float
    optimizer: float
    average: float  # moving average of the weights
    buffers: float

    @property
    def total(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.average + self.buffers


@dataclass(frozen=True, kw_only=True)
class Activations:
    """What autograd keeps for the backward pass of one step."""

    per_example: float  # bytes, of an example, or of a second of one
    fixed: float  # bytes that do not grow with the batch: half-precision copies of the weights, masks


def count_parts(recipe: DryRecipe) -> dict[str, PartSize]:
    """Count the parameters of every part of a recipe's objective at full size, without their memory."""
    with tempfile.TemporaryDirectory() as folder, init_empty_weights(include_buffers=False):
        # Only weights are left out: the front ends compute their filters.
        scale = replace(recipe.scale, batch_size=2, seconds=1.0)
        objective = recipe.make_task(scale, Path(folder)).objective
    return count_modules(objective)


def count_modules(objective: nn.Module) -> dict[str, PartSize]:
    """Count by part: the children of the model inside an objective, and the objective's own modules.

    A tensor that two parts share counts for the first.
    """
    parts: dict[str, PartSize] = {}
    seen: set[int] = set()
    named = [*objective.named_parameters(), *objective.named_buffers()]
    for name, tensor in named:
        if id(tensor) in seen:
            continue
        seen.add(id(tensor))
        part = ".".join(name.split(".")[:-1][:2])  # without the tensor's own name
        if isinstance(tensor, nn.Parameter):
            count = tensor.numel()
            size = PartSize(trainable=count) if tensor.requires_grad else PartSize(frozen=count)
        else:
            size = PartSize(buffer_bytes=tensor.numel() * tensor.element_size())
        parts[part] = parts.get(part, PartSize()) + size
    return parts


def state_bytes(
    size: PartSize, *, precision: str, zero: int, devices: int, averaged: bool = False
) -> StateBytes:
    """Bytes per device under AdamW (ZeRO, arXiv 1910.02054, section 3.1).

    bf16: weights and gradients of 2 bytes, in the optimizer the fp32 weights and two moments, 12 bytes; fp32:
    4, 4 and 8, under ZeRO 1 to 3 12 there as well, because DeepSpeed keeps its own fp32 weights in any case.
    ZeRO 1 shards the optimizer over the devices, 2 the gradients too, 3 the weights too, frozen ones among
    them. Recipes that run without DeepSpeed (ZeRO 0) keep fp32 weights under bf16 autocast: 4, 4 and 8, the
    same sum. The tensors of DeepSpeed 0.19 with two processes are exactly these. A moving average of the
    weights is 4 bytes more; recipes turn it off under DeepSpeed.
    """
    if precision not in ("fp32", "bf16"):
        raise ConfigError(f"precision must be fp32 or bf16, got {precision!r}")
    if zero not in ZERO_STAGES or devices < 1:
        raise ConfigError(f"zero must be 0 to 3 and devices at least 1, got {zero} and {devices}")
    width = 2 if precision == "bf16" else 4
    optimizer = 8 if precision == "fp32" and zero == 0 else 12
    return StateBytes(
        weights=width * (size.trainable + size.frozen) / (devices if zero >= 3 else 1),
        gradients=width * size.trainable / (devices if zero >= 2 else 1),
        optimizer=optimizer * size.trainable / (devices if zero >= 1 else 1),
        average=4 * size.trainable if averaged and zero == 0 else 0,
        buffers=size.buffer_bytes,
    )


def measure_saved_bytes(objective: nn.Module, batch: dict[str, Tensor], precision: str) -> int:
    """Bytes of the tensors that one forward pass keeps for backward, each storage once, weights left out."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*objective.parameters(), *objective.buffers())}
    saved: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        key = tensor.untyped_storage().data_ptr()
        if key not in own:
            saved.setdefault(key, tensor)  # held, so that its address is not given to another
        return tensor

    objective.train()
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=precision == "bf16"):
            losses = objective(**batch)
    size = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
    del losses
    return size


def estimate_activations(recipe: DryRecipe, precision: str) -> Activations:
    """Measure short cuts in small batches on a shallow model of full width, and scale to the recipe.

    Bytes = fixed + batch * (a + b * blocks) * seconds: attention here keeps no score matrix, so that all
    grows linearly with the length. Where the recipe recomputes its blocks in the backward pass, one block in
    full comes on top. Temporaries of the backward pass and the allocator's gaps are not in it.
    """
    growth = measure_growth(recipe, precision)
    target = recipe.scale
    seconds = growth.first.per_example + (target.blocks - MEASURED_BLOCKS[0]) * growth.block.per_example
    whole = recipe.without_recomputation()
    if whole is not None:
        seconds += measure_growth(whole, precision).block.per_example
    fixed = growth.first.fixed + (target.blocks - MEASURED_BLOCKS[0]) * growth.block.fixed
    return Activations(per_example=seconds * target.seconds, fixed=max(0.0, fixed))


class Growth(NamedTuple):
    """Activations of one second: of the shallowest model measured, and of one more block."""

    first: Activations
    block: Activations


def measure_growth(recipe: DryRecipe, precision: str) -> Growth:
    """Measure two depths by two batches at full width, on short cuts."""
    seconds = min(MEASURED_SECONDS, recipe.scale.seconds)
    few, many = MEASURED_BATCHES
    found = []
    for blocks in MEASURED_BLOCKS:
        small, large = (
            measure_scale(recipe, Scale(blocks=blocks, batch_size=size, seconds=seconds), precision)
            for size in MEASURED_BATCHES
        )
        per_example = (large - small) / (many - few)
        found.append(Activations(per_example=per_example / seconds, fixed=small - few * per_example))
    first, second = found
    step = MEASURED_BLOCKS[1] - MEASURED_BLOCKS[0]
    block = Activations(
        per_example=(second.per_example - first.per_example) / step, fixed=(second.fixed - first.fixed) / step
    )
    return Growth(first=first, block=block)


def measure_scale(recipe: DryRecipe, scale: Scale, precision: str) -> int:
    """Bytes that one step of a recipe at a scale keeps for backward."""
    with tempfile.TemporaryDirectory() as folder:
        task = recipe.make_task(scale, Path(folder))
        return measure_saved_bytes(task.objective, task.make_batch(np.random.default_rng(0)), precision)
