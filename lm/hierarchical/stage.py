"""One stage of the hierarchy: a decoder-only Transformer that writes target tokens after source tokens.

Paper: AccompGen (Luo et al., 2026, arXiv 2604.09054): QK-norm, GEGLU, RMSNorm, T5's relative position bias,
codebooks flattened with level offsets, streams of different rates aligned in time.

The sequence is the source's tokens, then the target's. Places are counted in target tokens: source token j
stands at the place of the target token of its own time, whatever the rates, so that the bias between both
tracks is one of time.
"""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...tokenizer.common.checkpoint import Component
from ...tokenizer.common.errors import ConfigError, DataError

_RELATIONS = 3  # source to source, target to source, target to target
_STEEPEST = 2.0  # slope that the bias of the most local head begins with, per e-fold of distance


@dataclass(frozen=True, kw_only=True)
class StreamConfig:
    """One kind of tokens: codes [levels, frames]."""

    rate_hz: float = 50.0  # frames per second
    levels: int = 1  # codebooks of a frame, written one after the other
    codebook_size: int = 1024

    def __post_init__(self) -> None:
        if not self.rate_hz > 0 or self.levels < 1 or self.codebook_size < 2:
            raise ConfigError(
                f"a stream needs a rate above 0 Hz, a level and two codes at least, got {self.rate_hz:g} Hz, "
                f"{self.levels} levels, {self.codebook_size} codes"
            )

    @property
    def tokens_hz(self) -> float:
        """Tokens per second."""
        return self.rate_hz * self.levels

    def frames(self, seconds: float) -> int:
        """Whole frames that begin before a time."""
        return max(0, -int(-(seconds * self.rate_hz - 1e-6) // 1))

    def flatten(self, codes: Tensor) -> Tensor:
        """Codes [batch, levels, frames] -> tokens [batch, frames * levels], level k counted from k * size."""
        offsets = self.codebook_size * torch.arange(self.levels, device=codes.device)
        return (codes + offsets[:, None]).transpose(1, 2).flatten(1)

    def check(self, codes: Tensor, what: str) -> Tensor:
        """Return codes [batch, levels, frames] as they are, or DataError where they are not this stream's."""
        if codes.ndim != 3 or codes.shape[1] != self.levels:
            raise DataError(
                f"{what} codes must be [batch, {self.levels} codebooks, frames], got {tuple(codes.shape)}; "
                "encode them with the tokenizer of this model"
            )
        if codes.numel() and (int(codes.min()) < 0 or int(codes.max()) >= self.codebook_size):
            raise DataError(
                f"{what} codes must be in 0..{self.codebook_size - 1}, got {int(codes.min())}.."
                f"{int(codes.max())}; encode them with the tokenizer of this model"
            )
        return codes.long()


@dataclass(frozen=True, kw_only=True)
class StageConfig:
    """Settings of a stage; the defaults make three of them the paper's 250M parameters."""

    source: StreamConfig = field(default_factory=StreamConfig)
    target: StreamConfig = field(default_factory=StreamConfig)
    hidden_dim: int = 768
    layers: int = 11
    heads: int = 12
    feed_forward_dim: int = 2048
    dropout: float = 0.0
    position_buckets: int = 64  # of the relative bias, half of them for each direction
    furthest_steps: int = 4096  # distance from which on all is equally far
    window_seconds: float = 10.0  # that it is trained on, and samples at a time
    overlap_seconds: float = 2.0  # of the last window that the next one continues
    gradient_checkpointing: bool = False

    def __post_init__(self) -> None:
        if self.layers < 1 or self.heads < 1 or self.hidden_dim % self.heads:
            raise ConfigError(
                f"hidden_dim {self.hidden_dim} must divide into {self.heads} heads, with one layer or more"
            )
        if self.position_buckets < 4 or self.position_buckets % 4:
            raise ConfigError(f"position_buckets must be a multiple of 4, got {self.position_buckets}")
        if self.furthest_steps <= self.position_buckets:
            raise ConfigError(f"furthest_steps must exceed position_buckets, got {self.furthest_steps}")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout must be in [0, 1), got {self.dropout}")
        if not 0 <= self.overlap_seconds < self.window_seconds:
            raise ConfigError(
                f"overlap_seconds must be in 0..window_seconds, got {self.overlap_seconds:g} of "
                f"{self.window_seconds:g}"
            )


class Places(NamedTuple):
    """Where the steps of a sequence stand."""

    order: Tensor  # [steps] which step of the sequence it is: a step sees those up to itself
    place: Tensor  # [steps] time in target tokens
    is_target: Tensor  # [steps] int64, 0 or 1

    def __getitem__(self, part: slice) -> "Places":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Places(*(values[part] for values in (self.order, self.place, self.is_target)))


def lay_out(config: StageConfig, source_frames: int, target_steps: int, device: torch.device) -> Places:
    """Return the places of the tokens of so many source frames and so many steps of the target after them."""
    tokens = source_frames * config.source.levels
    ratio = config.target.tokens_hz / config.source.tokens_hz
    # A hair more, because a product of rates may fall short of a whole number.
    heard = (torch.arange(tokens, dtype=torch.float64) * ratio + 1e-6).floor().long()
    place = torch.cat([heard, torch.arange(target_steps)]).to(device)
    order = torch.arange(len(place), device=device)
    return Places(order, place, (order >= tokens).long())


class RelativeBias(nn.Module):
    """T5's relative position bias (Raffel et al., 2020), one table for each relation of the two tracks."""

    def __init__(self, heads: int, buckets: int, furthest: int) -> None:
        super().__init__()
        self.side, self.furthest = buckets // 2, furthest
        # Near is closer: heads begin from global to local, so that what sounds together is found at once.
        exact = self.side // 2
        far = exact * (furthest / exact) ** (torch.arange(self.side - exact) / (self.side - exact))
        distances = torch.cat([torch.arange(exact), far]).log1p()
        slopes = torch.arange(heads) * (_STEEPEST / max(heads - 1, 1))
        table = -(torch.cat([distances, distances])[:, None] * slopes)
        self.table = nn.Parameter(table.repeat(_RELATIONS, 1, 1))  # [relations, buckets, heads]

    def bucket(self, distance: Tensor) -> Tensor:
        """Return T5's bucket of each distance, negative where the key comes later."""
        exact = self.side // 2
        size = distance.abs()
        steps = (size.clamp_min(1) / exact).log() / math.log(self.furthest / exact)
        far = exact + (steps * (self.side - exact)).long()
        return torch.where(size < exact, size, far.clamp_max(self.side - 1)) + self.side * (distance < 0)

    def forward(self, query: Places, key: Places, dtype: torch.dtype) -> Tensor:
        """Return what is added to the scores [heads, queries, keys], -inf where a key is not seen."""
        relation = query.is_target[:, None] + key.is_target
        index = relation * 2 * self.side + self.bucket(query.place[:, None] - key.place)
        bias = functional.embedding(index, self.table.to(dtype).flatten(0, 1)).permute(2, 0, 1)
        return bias.masked_fill(key.order > query.order[:, None], -torch.inf)


class KeyValueCache:
    """Keys and values of the steps so far, in buffers made once: [layers, rows, heads, steps, head_dim]."""

    def __init__(self, config: StageConfig, rows: int, steps: int, like: Tensor) -> None:
        shape = (config.layers, rows, config.heads, steps, config.hidden_dim // config.heads)
        self.keys, self.values, self.length = like.new_zeros(shape), like.new_zeros(shape), 0

    def extend(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Take a layer's keys and values of new steps; return those of all steps."""
        end = self.length + key.shape[2]
        self.keys[layer, :, :, self.length : end] = key
        self.values[layer, :, :, self.length : end] = value
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]


class RMSNorm(nn.Module):
    """Root mean square normalization by the vector's length: half the kernels of torch's own on CPUs."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.weight, self._share = nn.Parameter(torch.ones(dim)), dim**-0.5

    def forward(self, features: Tensor) -> Tensor:
        """Features [..., dim] -> the same shape."""
        length = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
        return features / (self._share * length).clamp_min(1e-6) * self.weight


class Block(nn.Module):
    """Pre-norm block: attention with normalized queries and keys, then GEGLU."""

    def __init__(self, config: StageConfig) -> None:
        super().__init__()
        dim, head_dim = config.hidden_dim, config.hidden_dim // config.heads
        self.heads, self.dropout = config.heads, config.dropout
        self.attention_norm, self.feed_forward_norm = RMSNorm(dim), RMSNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.query_norm, self.key_norm = RMSNorm(head_dim), RMSNorm(head_dim)
        self.attention_out = nn.Linear(dim, dim, bias=False)
        self.gate_up = nn.Linear(dim, 2 * config.feed_forward_dim, bias=False)
        self.down = nn.Linear(config.feed_forward_dim, dim, bias=False)

    def forward(
        self, hidden: Tensor, bias: Tensor, cache: KeyValueCache | None = None, layer: int = 0
    ) -> Tensor:
        """Hidden [rows, steps, dim], bias [heads, steps, all steps] -> hidden."""
        rows, steps, _ = hidden.shape
        qkv = self.qkv(self.attention_norm(hidden)).view(rows, steps, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each [rows, heads, steps, head_dim]
        query, key = self.query_norm(query).to(value.dtype), self.key_norm(key).to(value.dtype)
        if cache is not None:
            key, value = cache.extend(layer, key, value)
        # Four dimensions: fused kernels take no other bias.
        bias = bias[None].to(query.dtype)
        mixed = functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        mixed = self.attention_out(mixed.transpose(1, 2).flatten(2))
        hidden = hidden + functional.dropout(mixed, self.dropout, self.training)
        gate, up = self.gate_up(self.feed_forward_norm(hidden)).chunk(2, dim=-1)
        mixed = self.down(functional.gelu(gate) * up)
        return hidden + functional.dropout(mixed, self.dropout, self.training)


class Stage(Component[StageConfig]):
    """Predicts each token of the target from the source and from the target's past."""

    KIND = "accompgen_stage"
    CONFIG = StageConfig
    STORED = ("stage", "semantic_fingerprint", "codec_fingerprint")

    def __init__(self, config: StageConfig) -> None:
        super().__init__(config)
        self.stage: str | None = None  # which of the hierarchy it is
        self.semantic_fingerprint: str | None = None  # of the tokenizers whose codes it learned
        self.codec_fingerprint: str | None = None
        source, target, dim = config.source, config.target, config.hidden_dim
        # The last entry of each: a source that is not known, and the beginning of the target.
        self.source_embedding = nn.Embedding(source.levels * source.codebook_size + 1, dim)
        self.target_embedding = nn.Embedding(target.levels * target.codebook_size + 1, dim)
        self.bias = RelativeBias(config.heads, config.position_buckets, config.furthest_steps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = RMSNorm(dim)
        self.head = nn.Parameter(torch.randn(target.levels, target.codebook_size, dim) * 0.3 / dim**0.5)
        for block in self.blocks:  # what a block adds begins small, the more blocks there are
            assert isinstance(block, Block)
            for linear in (block.attention_out, block.down):
                nn.init.normal_(linear.weight, std=(2 * config.layers * linear.in_features) ** -0.5)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.head.device

    def hear(self, source: Tensor, known: Tensor) -> Tensor:
        """Return inputs [batch, tokens, dim] of source codes [batch, levels, frames], where known [batch]."""
        tokens, unknown = self.config.source.flatten(source), self.source_embedding.num_embeddings - 1
        return self.source_embedding(torch.where(known[:, None], tokens, unknown))

    def begin(self, target: Tensor) -> Tensor:
        """Return inputs [batch, tokens + 1, dim] of the steps that predict the tokens, and the one after.

        target: codes [batch, levels, frames].
        """
        tokens = functional.pad(self.config.target.flatten(target), (1, 0))
        tokens[:, 0] = self.target_embedding.num_embeddings - 1
        return self.target_embedding(tokens)

    def hidden_states(
        self,
        inputs: Tensor,
        places: Places | None = None,
        *,
        bias: Tensor | None = None,
        cache: KeyValueCache | None = None,
    ) -> Tensor:
        """Return states [batch, steps, dim] of inputs that stand at places and see each other.

        bias: in place of the places, that of the inputs to all steps in the cache and themselves.
        """
        if bias is None:
            assert places is not None
            bias = self.bias(places, places, inputs.dtype)
        hidden = inputs
        for layer, block in enumerate(self.blocks):
            if self.config.gradient_checkpointing and self.training:
                hidden = checkpoint(block, hidden, bias, use_reentrant=False)
                assert isinstance(hidden, Tensor)
            else:
                hidden = block(hidden, bias, cache, layer)
        if cache is not None:
            cache.length += inputs.shape[1]
        return self.norm(hidden)

    def forward(self, source: Tensor, target: Tensor, known: Tensor) -> Tensor:
        """Return logits [batch, levels, frames, codes] of a target under teacher forcing.

        source, target: codes [batch, levels, frames]; known [batch] bool: whether the source is heard.
        """
        levels, frames = target.shape[1:]
        inputs = torch.cat([self.hear(source, known), self.begin(target)[:, :-1]], dim=1)
        places = lay_out(self.config, source.shape[2], levels * frames, inputs.device)
        hidden = self.hidden_states(inputs, places)[:, -levels * frames :]
        hidden = hidden.unflatten(1, (frames, levels))
        return torch.einsum("bfld,lcd->blfc", hidden, self.head.to(hidden.dtype))


class StageObjective(nn.Module):
    """Cross-entropy of the target's tokens under teacher forcing."""

    def __init__(self, stage: Stage) -> None:
        super().__init__()
        self.stage = stage

    def forward(self, source: Tensor, target: Tensor, known: Tensor) -> dict[str, Tensor]:
        """Return {"total": nats per token, "level0": of the first level, ...}; arguments as of `Stage`."""
        logits = self.stage(source, target, known).float()
        nats = functional.cross_entropy(logits.permute(0, 3, 1, 2), target, reduction="none")
        return {"total": nats.mean(), **{f"level{k}": each for k, each in enumerate(nats.mean(dim=(0, 2)))}}
