"""What a decoder foretells of the chroma of its latents, and latents that are drawn to it.

A decoder draws latents that sound right rather than those that are likeliest, and so plays notes beside
those that codes and chart tell of. It also foretells the chroma itself, as the mean of all that it could
draw, and what it drew is moved to it, as little as will do: guidance by a differentiable measurement
(H. Chung et al., Diffusion Posterior Sampling for General Noisy Inverse Problems, 2023), once, at the end.
"""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.spectra import Chroma

PITCH_CLASSES = 12
# Chosen on validation songs: docs/renderer.md.
_STEPS, _RATE, _MOMENTUM, _WEIGHT = 8, 0.07, 0.5, 20.0
_SMOOTH_FRAMES = 9  # 180 ms: a way that changes faster is heard as flutter
_FLOOR = 1e-6


class ChromaHead(nn.Module):
    """Hidden states at 25 Hz -> chroma at 50 Hz, up to its level and scale, by what is near each frame."""

    def __init__(self, dim: int, per_token: int, taps: int = 5) -> None:
        super().__init__()
        self.per_token = per_token
        self.near = nn.Conv1d(dim, dim, taps, padding=taps // 2)
        self.activation = nn.GELU()
        self.out = nn.Linear(dim, per_token * PITCH_CLASSES)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, tokens, dim] -> [batch, per_token * tokens, 12], C first."""
        near = self.near(hidden.transpose(1, 2)).transpose(1, 2)
        told = self.out(hidden + self.activation(near))
        return rearrange(told, "b t (r p) -> b (t r) p", r=self.per_token)


def correlate(first: Tensor, second: Tensor) -> Tensor:
    """Correlation [...] over the pitch classes of two chromas [..., 12]; 0 where one is flat."""
    first, second = (each - each.mean(dim=-1, keepdim=True) for each in (first, second))
    return (first * second).sum(dim=-1) / (first.norm(dim=-1) * second.norm(dim=-1) + _FLOOR)


def sounding(chroma: Tensor) -> Tensor:
    """1 for frames of a chroma [..., 12] that have a harmony, else 0: [...]."""
    return (chroma.amax(dim=-1) > Chroma.SILENCE).to(chroma.dtype)


def follow_chroma(latents: Tensor, chroma: Tensor, hear: Callable[[Tensor], Tensor], free: Tensor) -> Tensor:
    """Return latents [batch, channels, frames] moved until they sound more like a chroma [batch, frames, 12].

    latents are of unit deviation; hear gives their chroma, with gradients; free [batch, 1, frames]: 1 where
    they may be moved, else 0. What is lost in likeness is weighed against half the square of the way, which
    is what it costs under a Gaussian of deviation 1. The way is smooth in time, as harmony is.
    """
    # Callers are in inference mode, whose tensors know no gradients.
    with torch.inference_mode(False), torch.enable_grad():
        start, wanted, free = (each.detach().float().clone() for each in (latents, chroma, free))
        free = free * (2 * _smooth(free) - 1).clamp_min(0)  # the way begins where what is held ends
        rough, speed = torch.zeros_like(start, requires_grad=True), torch.zeros_like(start)
        with torch.no_grad():
            counts = sounding(hear(start))
        for _ in range(_STEPS):
            way = _smooth(rough) * free
            alike = correlate(hear(start + way), wanted)
            loss = _WEIGHT * (counts * (1 - alike)).sum() + way.square().sum() / 2
            (slope,) = torch.autograd.grad(loss, [rough])
            with torch.no_grad():  # gradient descent; torch.optim takes 3 s to be imported
                speed = _MOMENTUM * speed + slope
                rough -= _RATE * speed
        moved = start + _smooth(rough.detach()) * free
    return moved.to(latents.dtype)


def _smooth(way: Tensor) -> Tensor:
    """Means over neighbouring frames of [batch, channels, frames], the nearest count most (Hann)."""
    weights = torch.hann_window(_SMOOTH_FRAMES + 2, periodic=False, device=way.device)[1:-1]
    reach = _SMOOTH_FRAMES // 2
    rows = functional.pad(way.flatten(0, 1)[:, None], (reach, reach), mode="replicate")
    means = functional.conv1d(rows, (weights / weights.sum())[None, None])
    return means[:, 0].unflatten(0, way.shape[:2])
