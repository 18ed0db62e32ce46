"""Transformer blocks of the diffusion decoder: rotary local attention under time modulation (DiT)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.blocks import FeedForward, RotaryPositions, rotate

MODULATIONS = 6  # shift, scale and gate of the attention, then of the feed-forward


class RMSNorm(nn.RMSNorm):
    """torch's, fit for autocast: the gain in the input's type keeps it one kernel, epsilon is float32's."""

    def __init__(self, dim: int, elementwise_affine: bool = True) -> None:
        super().__init__(dim, eps=torch.finfo(torch.float32).eps, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x."""
        gain = None if self.weight is None else self.weight.to(x.dtype)
        return functional.rms_norm(x, self.normalized_shape, gain, self.eps)


class LocalAttention(nn.Module):
    """Self-attention in which a token sees `window` tokens to each side; the cost is linear in the length."""

    def __init__(self, dim: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.window = window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm = RMSNorm(dim // heads)
        self.key_norm = RMSNorm(dim // heads)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, tokens, dim] -> the same shape."""
        batch, tokens, dim = hidden.shape
        qkv = self.qkv(hidden).view(batch, tokens, 3, self.heads, dim // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, tokens, head_dim]
        query = rotate(self.query_norm(query), *rotary).to(value.dtype)
        key = rotate(self.key_norm(key), *rotary).to(value.dtype)
        if tokens <= self.window + 1:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = self._attend_in_blocks(query, key, value)
        return self.out(mixed.transpose(1, 2).reshape(batch, tokens, dim))

    def _attend_in_blocks(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend block by block of `window` queries, each over the keys that it can see at all."""
        tokens = query.shape[2]
        positions = torch.arange(tokens, device=query.device)
        parts = []
        for start in range(0, tokens, self.window):
            stop = min(tokens, start + self.window)
            low, high = max(0, start - self.window), min(tokens, stop + self.window)
            visible = (positions[start:stop, None] - positions[None, low:high]).abs() <= self.window
            parts.append(
                functional.scaled_dot_product_attention(
                    query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high], attn_mask=visible
                )
            )
        return torch.cat(parts, dim=2)


class ModulatedBlock(nn.Module):
    """Pre-norm block whose norms and branches are modulated by one vector shared by all blocks.

    The shared vector plus a learned table per block is PixArt-alpha's adaLN-single (arXiv 2310.00426, 2.3):
    DiT's quality without a third of its weights in modulation matrices.
    """

    def __init__(self, dim: int, heads: int, window: int, feed_forward_dim: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim, elementwise_affine=False)
        self.attention = LocalAttention(dim, heads, window)
        self.feed_forward_norm = RMSNorm(dim, elementwise_affine=False)
        self.feed_forward = FeedForward(dim, feed_forward_dim)
        self.table = nn.Parameter(torch.zeros(MODULATIONS, dim))

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], modulation: Tensor) -> Tensor:
        """hidden [batch, tokens, dim], modulation [batch or 1, 6, dim] -> [batch, tokens, dim]."""
        # Each part is [batch, 1, dim]; a modulation of zeros is an ordinary block.
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (modulation + self.table).split(1, dim=1)
        attended = self.attention(self.attention_norm(hidden) * (1 + scale_a) + shift_a, rotary)
        hidden = hidden + (1 + gate_a) * attended
        fed = self.feed_forward(self.feed_forward_norm(hidden) * (1 + scale_f) + shift_f)
        return hidden + (1 + gate_f) * fed


class ModulatedTransformer(nn.Module):
    """A stack of blocks; reaches blocks * window tokens to each side."""

    def __init__(self, *, dim: int, heads: int, window: int, feed_forward_dim: int, blocks: int) -> None:
        super().__init__()
        self.rotary = RotaryPositions(dim // heads)
        stack = [ModulatedBlock(dim, heads, window, feed_forward_dim) for _ in range(blocks)]
        self.blocks = nn.ModuleList(stack)
        for block in stack:
            # Branches start small, so that a deep stack starts near the identity.
            for linear in (block.attention.out, block.feed_forward.down):
                nn.init.normal_(linear.weight, std=0.02 / blocks**0.5)

    def forward(self, hidden: Tensor, modulation: Tensor) -> Tensor:
        """hidden [batch, tokens, dim], modulation [batch or 1, 6, dim] -> [batch, tokens, dim]."""
        rotary = self.rotary(hidden.shape[1])
        for block in self.blocks:
            hidden = block(hidden, rotary, modulation)
        return hidden


class TimeEmbedding(nn.Module):
    """Diffusion time in 0..1 -> one modulation vector (sinusoids, then two layers)."""

    SINUSOIDS = 128

    frequencies: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        exponents = torch.arange(self.SINUSOIDS // 2, dtype=torch.float32) / (self.SINUSOIDS // 2)
        self.register_buffer("frequencies", 1000.0 * 10_000.0**-exponents, persistent=False)
        out = nn.Linear(dim, MODULATIONS * dim)
        nn.init.zeros_(out.weight)
        nn.init.zeros_(out.bias)
        self.layers = nn.Sequential(nn.Linear(self.SINUSOIDS, dim), nn.SiLU(), out)

    def forward(self, time: Tensor) -> Tensor:
        """time [batch] -> modulation [batch, 6, dim]."""
        angles = time[:, None] * self.frequencies
        return self.layers(torch.cat([angles.cos(), angles.sin()], dim=-1)).unflatten(1, (MODULATIONS, -1))
