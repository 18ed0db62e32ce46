"""Floating-point operations of one training step of the language model, for model-FLOPs utilization (MFU).

Every product of matrices [a, b] x [b, c] is 2abc operations; the backward pass does it once for each side
that has a gradient. Attention is counted over all pairs of steps, although half of them are hidden from each
other, and what gradient checkpointing computes twice counts once, as PaLM's MFU has it (arXiv 2204.02311,
appendix B) and as torch's FlopCounterMode counts. Look-ups, norms and softmax are left out.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from duotok.lm.dual_track.layout import MODES, TRACKS, mode_into

if TYPE_CHECKING:
    from torch import Tensor

    from duotok.lm.dual_track.model import DualTrackLMConfig
    from duotok.recipes.lm.data import DataConfig

TERA = 1e12
MATRICES_WITH_BOTH_GRADIENTS = 3  # forward, gradient of the weights, gradient of the input
MATRICES_WITH_ONE_GRADIENT = 2  # the other side is the tokenizer's code vectors, which are not trained


def step_flops(
    config: "DualTrackLMConfig", mode: str, *, examples: int, frames: int, prompt_weight: float = 0.0
) -> float:
    """Operations of the forward and backward pass of one batch of one mode.

    frames: of each window; with a source the model sees twice as many steps. prompt_weight: LMObjective's.
    """
    source, predicted = MODES[mode]
    steps = frames if source is None else 2 * frames
    width, inner = config.hidden_dim, config.feed_forward_dim
    keys = config.key_value_heads * (width // config.heads)
    layer = 2 * width * (2 * width + 2 * keys)  # query and output; key and value
    layer += 2 * 3 * width * inner
    layer += 2 * 2 * width * steps  # scores, and values by scores
    projection = 2 * 2 * config.embedding_dim * width
    anchors = 2 * 2 * config.code_dim * config.embedding_dim  # of both tracks
    trunk = MATRICES_WITH_BOTH_GRADIENTS * (config.layers * layer + projection)
    trunk += MATRICES_WITH_ONE_GRADIENT * anchors
    sizes = {"vocal": config.vocal_codes, "accompaniment": config.accompaniment_codes}
    heads = {
        track: MATRICES_WITH_BOTH_GRADIENTS * 2 * width * (config.code_dim + size)
        + MATRICES_WITH_ONE_GRADIENT * 2 * config.code_dim * size
        for track, size in sizes.items()
    }
    per_frame = sum(heads.values())  # both heads take part in every batch
    if source is not None and prompt_weight:
        per_frame += sum(heads[track] for track in predicted)
    return float(examples * (steps * trunk + frames * per_frame))


def batch_flops(
    config: "DualTrackLMConfig", batch: "Mapping[str, Tensor]", prompt_weight: float = 0.0
) -> float:
    """Operations of one step on the arguments of an `LMObjective`."""
    examples, frames = batch["target_vocal"].shape
    if batch["vocal"].shape[1] == frames:
        mode = "unconditional"
    else:
        mode = mode_into("vocal" if batch["weight_vocal"].any() else "accompaniment")
    return step_flops(config, mode, examples=examples, frames=frames, prompt_weight=prompt_weight)


def batch_tokens(batch: "Mapping[str, Tensor]") -> int:
    """Tokens of music in a batch: the codes of both tracks of its windows, each window counted once."""
    return batch["target_vocal"].numel() + batch["target_accompaniment"].numel()


def mean_flops_and_tokens(
    config: "DualTrackLMConfig", data: "DataConfig", *, batch_size: int, rate_hz: float, prompt_weight: float
) -> tuple[float, float]:
    """Mean operations and tokens of one step on one device over a recipe's modes and window lengths.

    batch_size: windows of the shortest length; of longer ones a batch holds as many as have as many frames.
    """
    shortest = max(1, round(min(seconds for seconds, _ in data.windows) * rate_hz))
    modes, windows = data.mode_shares(), data.windows
    flops = tokens = 0.0
    for seconds, share in windows:
        frames = max(1, round(seconds * rate_hz))
        examples = max(1, batch_size * shortest // frames)
        window_share = share / sum(each for _, each in windows)
        tokens += window_share * len(TRACKS) * examples * frames
        for mode, mode_share in modes.items():
            weight = window_share * mode_share / sum(modes.values())
            flops += weight * step_flops(
                config, mode, examples=examples, frames=frames, prompt_weight=prompt_weight
            )
    return flops, tokens


def step_seconds(flops: float, *, mfu: float, peak_tflops: float) -> float:
    """Return how long a step of so many operations takes a device of this peak at this utilization."""
    return flops / (mfu * peak_tflops * TERA)
