"""The Transformer over latents before the waveform decoder of ear-VAE (arXiv 2509.14912)."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..tokenizer.blocks import RotaryPositions, rotate

FEED_FORWARD_FACTOR = 4


class GlobalAttention(nn.Module):
    """Self-attention of every frame to every frame; rotary positions turn the first half of each head."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape; rotary: each [frames, head_dim / 2]."""
        qkv = self.qkv(hidden).unflatten(-1, (3, -1, self.head_dim))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, frames, head_dim]
        query, key = (_rotate_half(part, rotary).to(value.dtype) for part in (query, key))
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.out(mixed.transpose(1, 2).flatten(2))


class GatedFeedForward(nn.Module):
    """Two layers, the first gated by SiLU."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 2 * FEED_FORWARD_FACTOR * dim)  # values, then gates
        self.down = nn.Linear(FEED_FORWARD_FACTOR * dim, dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        values, gates = self.up(hidden).chunk(2, dim=-1)
        return self.down(values * functional.silu(gates))


class LatentBlock(nn.Module):
    """Pre-norm residual block."""

    def __init__(self, dim: int, head_dim: int) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim)
        self.attention = GlobalAttention(dim, head_dim)
        self.feed_forward_norm = nn.LayerNorm(dim)
        self.feed_forward = GatedFeedForward(dim)
        # Branches start silent: an untrained stack is the identity.
        for linear in (self.attention.out, self.feed_forward.down):
            nn.init.zeros_(linear.weight)
        nn.init.zeros_(self.feed_forward.down.bias)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        """hidden [batch, frames, dim] -> the same shape."""
        hidden = hidden + self.attention(self.attention_norm(hidden), rotary)
        return hidden + self.feed_forward(self.feed_forward_norm(hidden))


class LatentTransformer(nn.Module):
    """Blocks over all frames of a stretch of latents, in the channels of the latents themselves."""

    def __init__(self, *, dim: int, head_dim: int, blocks: int) -> None:
        super().__init__()
        self.rotary = RotaryPositions(head_dim // 2)
        self.blocks = nn.ModuleList(LatentBlock(dim, head_dim) for _ in range(blocks))

    def forward(self, latents: Tensor) -> Tensor:
        """latents [batch, dim, frames] -> the same shape."""
        hidden = latents.mT
        rotary = self.rotary(hidden.shape[1])
        for block in self.blocks:
            hidden = block(hidden, rotary)
        return hidden.mT

    def in_windows(self, latents: Tensor, window: int, overlap: int) -> Tensor:
        """The same by windows of so many frames at most, crossfaded where they overlap by `overlap` or more.

        Exact for a single window only: beyond it, a frame sees its window and not the whole song.
        """
        frames = latents.shape[-1]
        result = self(latents[..., :window])
        while (done := result.shape[-1]) < frames:
            start = min(done - overlap, frames - window)  # the last window looks back as far as the others
            part = self(latents[..., start : start + window])
            rise = torch.linspace(0, 1, overlap, device=latents.device)
            faded = torch.lerp(result[..., start : start + overlap], part[..., :overlap], rise)
            result = torch.cat([result[..., :start], faded, part[..., overlap:]], dim=-1)
        return result


def _rotate_half(heads: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """heads [batch, heads, frames, head_dim]: the first half by its position, the second as it is."""
    turned, kept = heads.chunk(2, dim=-1)
    return torch.cat([rotate(turned, *rotary), kept.to(rotary[0].dtype)], dim=-1)
