"""The probe: a small Conformer on frozen code vectors, with one linear head per label (P B.2).

Blocks as in Gulati et al., Conformer (2020): half a feed-forward, attention, convolution, half a
feed-forward, all pre-norm. Positions come from the depthwise convolutions alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from duotok.tokenizer.common.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ConformerConfig:
    """Settings of the probe."""

    dim: int = 64
    heads: int = 4
    blocks: int = 2
    expansion: int = 4  # of the feed-forwards
    kernel: int = 15  # steps under the depthwise convolution
    stride: int = 4  # frames per step
    dropout: float = 0.2
    hidden_share: float = 0.1  # share of the frames that are hidden from the probe in training

    def __post_init__(self) -> None:
        if self.dim % self.heads:
            raise ConfigError(f"dim {self.dim} must divide into {self.heads} heads")
        if self.kernel % 2 == 0:
            raise ConfigError(f"kernel must be odd, got {self.kernel}")
        if not 0 <= self.hidden_share < 1 or not 0 <= self.dropout < 1:
            raise ConfigError("hidden_share and dropout must be in [0, 1)")


class FeedForward(nn.Sequential):
    """Pre-norm feed-forward of a block."""

    def __init__(self, config: ConformerConfig) -> None:
        hidden = config.expansion * config.dim
        super().__init__(
            nn.LayerNorm(config.dim),
            nn.Linear(config.dim, hidden),
            nn.SiLU(),
            nn.Dropout(config.dropout),
            nn.Linear(hidden, config.dim),
            nn.Dropout(config.dropout),
        )


class SelfAttention(nn.Module):
    """Pre-norm attention over all steps."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.norm = nn.LayerNorm(config.dim)
        self.qkv = nn.Linear(config.dim, 3 * config.dim)
        self.out = nn.Linear(config.dim, config.dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        qkv = self.qkv(self.norm(features)).unflatten(-1, (3, self.heads, -1))
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, steps, dim / heads]
        mixed = functional.scaled_dot_product_attention(query, key, value)
        return self.dropout(self.out(mixed.transpose(1, 2).flatten(-2)))


class Convolution(nn.Module):
    """Pre-norm gated depthwise convolution."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        dim = config.dim
        self.norm = nn.LayerNorm(dim)
        self.gated = nn.Linear(dim, 2 * dim)
        self.depthwise = nn.Conv1d(dim, dim, config.kernel, padding=config.kernel // 2, groups=dim)
        self.inner_norm = nn.LayerNorm(dim)  # of one clip, where the paper's batch norm is of all
        self.out = nn.Linear(dim, dim)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        hidden = functional.glu(self.gated(self.norm(features)), dim=-1)
        hidden = self.depthwise(hidden.transpose(1, 2)).transpose(1, 2)
        return self.dropout(self.out(functional.silu(self.inner_norm(hidden))))


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward."""

    def __init__(self, config: ConformerConfig) -> None:
        super().__init__()
        self.before, self.after = FeedForward(config), FeedForward(config)
        self.attention, self.convolution = SelfAttention(config), Convolution(config)
        self.norm = nn.LayerNorm(config.dim)

    def forward(self, features: Tensor) -> Tensor:
        """features [batch, steps, dim] -> the same shape."""
        features = features + 0.5 * self.before(features)
        features = features + self.attention(features)
        features = features + self.convolution(features)
        return self.norm(features + 0.5 * self.after(features))


class ConformerProbe(nn.Module):
    """Logits of every label from the codes of one or more tracks; the code vectors stay as they are."""

    def __init__(
        self, vectors: Mapping[str, Tensor], classes: Mapping[str, int], config: ConformerConfig
    ) -> None:
        """vectors: by track [codes, code_dim]; classes: number of them by label."""
        super().__init__()
        self.config = config
        self.tracks = tuple(vectors)
        for track, table in vectors.items():
            self.register_buffer(f"vectors_{track}", table)
        width = sum(table.shape[1] for table in vectors.values())
        self.project = nn.Conv1d(width, config.dim, 2 * config.stride - 1, config.stride, config.stride - 1)
        self.blocks = nn.ModuleList(ConformerBlock(config) for _ in range(config.blocks))
        self.heads = nn.ModuleDict({name: nn.Linear(2 * config.dim, size) for name, size in classes.items()})

    def forward(self, codes: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """codes: by track [batch, frames] -> {label: logits [batch, classes]}."""
        parts = [
            functional.embedding(codes[track], self.get_buffer(f"vectors_{track}")) for track in self.tracks
        ]
        features = torch.cat(parts, dim=-1)  # [batch, frames, width]
        if self.training and self.config.hidden_share > 0:
            shown = torch.rand(features.shape[:2], device=features.device) >= self.config.hidden_share
            features = features * shown[..., None]
        hidden = self.project(features.transpose(1, 2)).transpose(1, 2)  # [batch, steps, dim]
        for block in self.blocks:
            hidden = block(hidden)
        pooled = torch.cat([hidden.mean(dim=1), hidden.amax(dim=1)], dim=-1)
        return {name: head(pooled) for name, head in self.heads.items()}
