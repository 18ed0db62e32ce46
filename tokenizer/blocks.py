"""Transformer blocks with rotary positions and local attention."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class RotaryPositions(nn.Module):
    """Cosines and sines of rotary position embedding for frames 0..n-1."""

    frequencies: Tensor

    def __init__(self, head_dim: int, base: float = 10_000.0) -> None:
        super().__init__()
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self.register_buffer("frequencies", base**-exponents, persistent=False)

    def forward(self, frames: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines, each [frames, head_dim]."""
        positions = torch.arange(frames, device=self.frequencies.device, dtype=torch.float32)
        angles = positions[:, None] * self.frequencies[None, :]
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()


def rotate(features: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Apply rotary positions to features [batch, heads, frames, head_dim]."""
    first, second = features.chunk(2, dim=-1)
    return features * cosines + torch.cat([-second, first], dim=-1) * sines


class Attention(nn.Module):
    """Self-attention in which a frame sees `window` frames to each side."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        batch, frames, dim = features.shape
        qkv = self.qkv(features).view(batch, frames, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, frames, head_dim]
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        return self.out(mixed.transpose(1, 2).reshape(batch, frames, dim))


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(dim, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, features: Tensor) -> Tensor:
        gate, up = self.gate_up(features).chunk(2, dim=-1)
        return self.down(functional.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm Transformer block."""

    def __init__(self, dim: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(dim)
        self.attention = Attention(dim, heads)
        self.feed_forward_norm = nn.RMSNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, features: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor) -> Tensor:
        features = features + self.attention(self.attention_norm(features), rotary, mask)
        return features + self.feed_forward(self.feed_forward_norm(features))


class LocalTransformer(nn.Module):
    """A stack of blocks whose reach to each side is exactly `reach_frames`.

    Local attention makes the result of a frame independent of everything further away, so that long audio can
    be computed in overlapping chunks with the result of one pass.
    """

    def __init__(self, *, dim: int, heads: int, hidden: int, blocks: int, window: int) -> None:
        super().__init__()
        self.window = window
        self.rotary = RotaryPositions(dim // heads)
        self.blocks = nn.ModuleList(Block(dim, heads, hidden) for _ in range(blocks))
        self.norm = nn.RMSNorm(dim)

    @property
    def reach_frames(self) -> int:
        return self.window * len(self.blocks)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> the same shape."""
        frames = features.shape[1]
        rotary = self.rotary(frames)
        positions = torch.arange(frames, device=features.device)
        mask = (positions[:, None] - positions[None, :]).abs() <= self.window
        for block in self.blocks:
            features = block(features, rotary, mask)
        return self.norm(features)
