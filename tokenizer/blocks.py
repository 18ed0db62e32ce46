"""Networks of the tokenizer and its readers: Transformer with local attention, encoder, convolutions."""

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional

TAPS = 5  # steps that one gated convolution sees


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


def attend_near(query: Tensor, key: Tensor, value: Tensor, window: int) -> Tensor:
    """Attend `window` steps to each side; all [batch, heads, steps, head_dim]. Linear in the steps.

    Block by block of `window` queries, each over the keys that it can see at all.
    """
    steps = query.shape[2]
    if steps <= window + 1:
        return functional.scaled_dot_product_attention(query, key, value)
    positions = torch.arange(steps, device=query.device)
    parts = []
    for start in range(0, steps, window):
        stop = min(steps, start + window)
        low, high = max(0, start - window), min(steps, stop + window)
        visible = (positions[start:stop, None] - positions[None, low:high]).abs() <= window
        seen = query[:, :, start:stop], key[:, :, low:high], value[:, :, low:high]
        parts.append(functional.scaled_dot_product_attention(*seen, attn_mask=visible))
    return torch.cat(parts, dim=2)


class RMSNorm(nn.RMSNorm):
    """torch's, fit for autocast: the gain in the input's type keeps it one kernel, epsilon is float32's."""

    def __init__(
        self, dim: int, elementwise_affine: bool = True, epsilon: float = torch.finfo(torch.float32).eps
    ) -> None:
        super().__init__(dim, eps=epsilon, elementwise_affine=elementwise_affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the last dimension of x."""
        gain = None if self.weight is None else self.weight.to(x.dtype)
        return functional.rms_norm(x, self.normalized_shape, gain, self.eps)


class Attention(nn.Module):
    """Self-attention in which a frame sees `window` frames to each side, or (None) all."""

    def __init__(self, dim: int, heads: int, window: int | None = None) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, features: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        qkv = self.qkv(features)
        query, key, value = rearrange(
            qkv, "b frames (n heads dim) -> n b heads frames dim", n=3, heads=self.heads
        )
        query, key = rotate(query, *rotary), rotate(key, *rotary)
        if self.window is None:
            mixed = functional.scaled_dot_product_attention(query, key, value)
        else:
            mixed = attend_near(query, key, value, self.window)
        return self.out(rearrange(mixed, "b heads frames dim -> b frames (heads dim)"))


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

    def __init__(self, dim: int, heads: int, hidden: int, window: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(dim)
        self.attention = Attention(dim, heads, window)
        self.feed_forward_norm = RMSNorm(dim)
        self.feed_forward = FeedForward(dim, hidden)

    def forward(self, features: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
        features = features + self.attention(self.attention_norm(features), rotary)
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
        self.blocks = nn.ModuleList(Block(dim, heads, hidden, window) for _ in range(blocks))
        self.norm = RMSNorm(dim)

    @property
    def reach_frames(self) -> int:
        return self.window * len(self.blocks)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> the same shape."""
        rotary = self.rotary(features.shape[1])
        for block in self.blocks:
            features = block(features, rotary)
        return self.norm(features)


class Encoder(nn.Module):
    """Normalized log-mel at 100 Hz -> convolutional downsampling by 4 -> Transformer, at 25 Hz."""

    def __init__(self, mel_bands: int, transformer: LocalTransformer, dim: int) -> None:
        super().__init__()
        self.down1 = nn.Conv1d(mel_bands, dim, kernel_size=4, stride=2, padding=1)
        self.down2 = nn.Conv1d(dim, dim, kernel_size=4, stride=2, padding=1)
        self.norm = RMSNorm(dim)
        self.transformer = transformer

    def forward(self, mel: Tensor) -> Tensor:
        """mel [batch, 4 * frames, bands] -> [batch, frames, dim]."""
        hidden = functional.gelu(self.down1(mel.transpose(1, 2)))
        hidden = self.down2(hidden).transpose(1, 2)
        return self.transformer(self.norm(hidden))


class NoisyBottleneck(nn.Module):
    """Stage 2's bottleneck: frames are replaced by noise of the features' own mean and variance (P eq. 1)."""

    def __init__(self, dim: int, code_dim: int) -> None:
        super().__init__()
        self.project_in = nn.Linear(dim, code_dim)
        self.project_out = nn.Linear(code_dim, dim)

    def forward(self, features: Tensor, noise_probability: float) -> Tensor:
        """features [batch, frames, dim] -> the same shape."""
        codes = self.project_in(features)
        if noise_probability > 0:
            statistics = codes.detach().float().flatten(0, 1)
            noise = torch.randn_like(codes) * statistics.std(dim=0) + statistics.mean(dim=0)
            replaced = torch.rand(codes.shape[:2], device=codes.device) < noise_probability
            codes = torch.where(replaced[..., None], noise.to(codes.dtype), codes)
        return self.project_out(codes)


class UpsamplingHead(nn.Module):
    """Transposed convolutions that double the frame rate `doublings` times, then a linear read-out."""

    def __init__(self, dim: int, hidden: int, out_dim: int, doublings: int) -> None:
        super().__init__()
        widths = [dim] + [hidden] * doublings
        self.layers = nn.ModuleList(
            nn.ConvTranspose1d(before, after, kernel_size=4, stride=2, padding=1)
            for before, after in zip(widths[:-1], widths[1:], strict=True)
        )
        self.out = nn.Conv1d(hidden, out_dim, kernel_size=3, padding=1)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, frames, dim] -> [batch, frames * 2**doublings, out_dim]."""
        hidden = features.transpose(1, 2)
        for layer in self.layers:
            hidden = functional.gelu(layer(hidden))
        return self.out(hidden).transpose(1, 2)


class GatedConvolution(nn.Module):
    """A gated convolution around a skip connection, as a product with shifted copies: fast on CPUs."""

    def __init__(self, dim: int, dilation: int, dropout: float) -> None:
        super().__init__()
        self.dilation, self.dropout = dilation, dropout
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(TAPS * dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, features: Tensor) -> Tensor:
        """Features [batch, steps, dim] -> the same shape."""
        steps, reach = features.shape[1], self.dilation * (TAPS // 2)
        padded = functional.pad(self.norm(features), (0, 0, reach, reach))
        taps = [padded[:, tap * self.dilation : tap * self.dilation + steps] for tap in range(TAPS)]
        value, gate = self.gated(torch.cat(taps, dim=-1)).chunk(2, dim=-1)
        mixed = functional.dropout(value * torch.sigmoid(gate), self.dropout, self.training)
        return features + self.out(mixed)
