"""How one code is chosen from logits: temperature, top-k, top-p and one uniform number per row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """Settings of sampling and stitching."""

    guidance: float = 1.5  # logits = without + guidance * (with - without); 1 turns guidance off
    temperature: float = 0.95  # 0 takes the most likely code
    top_k: int = 100  # most likely codes kept; 0 keeps all
    top_p: float = 0.95  # smallest set of codes with this probability is kept; 1 keeps all
    window_frames: int = 750
    overlap_frames: int = 50  # codes of the last window that the next one continues

    def __post_init__(self) -> None:
        if self.guidance < 0:
            raise ConfigError(f"guidance must not be negative, got {self.guidance}")
        if self.temperature < 0:
            raise ConfigError(f"temperature must not be negative, got {self.temperature}")
        if self.top_k < 0:
            raise ConfigError(f"top_k must not be negative, got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p must be in (0, 1], got {self.top_p}")
        if not 0 <= self.overlap_frames < self.window_frames:
            raise ConfigError(
                f"overlap_frames must be in 0..window_frames - 1, "
                f"got {self.overlap_frames} of {self.window_frames}"
            )


def pick_codes(logits: Tensor, uniform: Tensor, config: SamplingConfig) -> Tensor:
    """Return one code [rows] per row of logits [rows, codes], by the inverse of the distribution function.

    uniform: a number in [0, 1) per row [rows]. Nothing here waits for the device.
    """
    if config.temperature == 0:
        return logits.argmax(dim=-1)
    kept = min(config.top_k or logits.shape[-1], logits.shape[-1])
    values, codes = (logits.float() / config.temperature).topk(kept, dim=-1)  # in falling order
    probabilities = values.softmax(dim=-1)
    before = probabilities.cumsum(dim=-1) - probabilities
    # A code stays while the codes before it do not reach top_p together; the first always stays.
    allowed = before < config.top_p
    total = (probabilities * allowed).sum(dim=-1, keepdim=True)
    # The last code that begins at or below the drawn share: the first begins at 0, so there is one.
    reached = (before <= uniform[:, None] * total) & allowed
    return codes.gather(1, reached.sum(dim=-1, keepdim=True) - 1)[:, 0]


def draw_uniform(seed: int, frames: int) -> Tensor:
    """Return the numbers in [0, 1) that a candidate is drawn by, one per frame of the song: [frames]."""
    return torch.rand(frames, generator=torch.Generator().manual_seed(seed))
