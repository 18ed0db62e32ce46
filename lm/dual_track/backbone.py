"""The Transformer of Qwen2 (arXiv 2407.10671), its weights called as in transformers' `Qwen2Model`.

Written out because it is short, and importing transformers takes longer than composing ten seconds.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from ...tokenizer.blocks import RMSNorm, rotate

AMPERE = (8, 0)  # lowest compute capability of flash-attention 2
WIDEST_FLASH_HEAD = 256
EPSILON = 1e-6  # of the norms
_WEIGHT_DEVIATION = 0.02  # of new weights
# (queries, keys, values [batch, heads or groups, steps, dim], dropout) -> mixes of the values up to each step
Attend = Callable[[Tensor, Tensor, Tensor, float], Tensor]


class AttentionChoice(NamedTuple):
    """A kernel by transformers' name, and why this one."""

    name: str
    reason: str


def choose_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> AttentionChoice:
    """Choose flash-attention 2 where it is installed and can run, SDPA otherwise.

    It runs on CUDA devices from Ampere on, in float16 and bfloat16, with heads of up to 256 numbers. dtype:
    what the kernel is given, under autocast the type cast to.
    """
    missing = None
    if device.type != "cuda":
        missing = f"flash-attention 2 needs CUDA, this is {device.type}"
    elif find_spec("flash_attn") is None:
        missing = "flash-attn is not installed"
    elif torch.cuda.get_device_capability(device) < AMPERE:
        missing = f"flash-attention 2 needs Ampere or newer, this is {torch.cuda.get_device_name(device)}"
    elif dtype not in (torch.float16, torch.bfloat16):
        missing = f"flash-attention 2 needs half precision, this is {str(dtype).removeprefix('torch.')}"
    elif head_dim > WIDEST_FLASH_HEAD:
        missing = f"flash-attention 2 takes heads of up to {WIDEST_FLASH_HEAD} numbers, these have {head_dim}"
    if missing is not None:
        return AttentionChoice("sdpa", missing)
    return AttentionChoice("flash_attention_2", f"flash-attn is installed, inputs are {dtype} on {device}")


def _attend(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    return functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, enable_gqa=True
    )


def _attend_by_flash(query: Tensor, key: Tensor, value: Tensor, dropout: float) -> Tensor:
    from flash_attn import flash_attn_func  # pyright: ignore[reportMissingImports]

    by_step = (each.transpose(1, 2) for each in (query, key, value.to(query.dtype)))
    return flash_attn_func(*by_step, dropout_p=dropout, causal=True).transpose(1, 2)


KERNELS: dict[str, Attend] = {"sdpa": _attend, "flash_attention_2": _attend_by_flash}


class _Attention(nn.Module):
    """Causal self-attention; several heads of queries share a group of keys and values."""

    def __init__(self, dim: int, heads: int, groups: int, dropout: float) -> None:
        super().__init__()
        self.head_dim, self.dropout = dim // heads, dropout
        self.q_proj = nn.Linear(dim, dim)
        self.k_proj = nn.Linear(dim, groups * self.head_dim)
        self.v_proj = nn.Linear(dim, groups * self.head_dim)
        self.o_proj = nn.Linear(dim, dim, bias=False)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        query, key, value = (
            part(hidden).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for part in (self.q_proj, self.k_proj, self.v_proj)
        )
        # Cosines and sines have the states' type, which autocast leaves at float32.
        query, key = (rotate(each, *rotary).to(value.dtype) for each in (query, key))
        mixed = attend(query, key, value, self.dropout if self.training else 0.0)
        return self.o_proj(mixed.transpose(1, 2).flatten(2))


class _FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(dim, hidden, bias=False)
        self.up_proj = nn.Linear(dim, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, dim, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class _Layer(nn.Module):
    """Pre-norm Transformer layer."""

    def __init__(self, dim: int, heads: int, groups: int, feed_forward_dim: int, dropout: float) -> None:
        super().__init__()
        self.self_attn = _Attention(dim, heads, groups, dropout)
        self.mlp = _FeedForward(dim, feed_forward_dim)
        self.input_layernorm = RMSNorm(dim, epsilon=EPSILON)
        self.post_attention_layernorm = RMSNorm(dim, epsilon=EPSILON)

    def forward(self, hidden: Tensor, rotary: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class Qwen2Backbone(nn.Module):
    """Inputs that are embedded already -> states, each of which sees the steps up to its own."""

    frequencies: Tensor

    def __init__(
        self,
        *,
        dim: int,
        layers: int,
        heads: int,
        groups: int,
        feed_forward_dim: int,
        rope_theta: float,
        dropout: float = 0.0,
    ) -> None:
        """groups: of keys and values."""
        super().__init__()
        self.dim, self.heads, self.groups, self.feed_forward_dim = dim, heads, groups, feed_forward_dim
        self.layers = nn.ModuleList(
            _Layer(dim, heads, groups, feed_forward_dim, dropout) for _ in range(layers)
        )
        self.norm = RMSNorm(dim, epsilon=EPSILON)
        exponents = torch.arange(0, dim // heads, 2).float() / (dim // heads)
        self.register_buffer("frequencies", 1.0 / rope_theta**exponents, persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=_WEIGHT_DEVIATION)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def rotary(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions [...], each [..., head_dim]."""
        angles = positions[..., None].float() * self.frequencies.float()
        angles = torch.cat([angles, angles], dim=-1)
        return angles.cos(), angles.sin()

    def forward(
        self, hidden: Tensor, positions: Tensor, *, kernel: str = "sdpa", recompute: bool = False
    ) -> Tensor:
        """Inputs [batch, steps, dim] at positions [batch, steps] -> the same shape.

        kernel: of KERNELS; recompute: a layer's inside for its gradients, instead of keeping it.
        """
        rotary = tuple(each[:, None].to(hidden.dtype) for each in self.rotary(positions))
        for layer in self.layers:
            if recompute:
                hidden = checkpoint(layer, hidden, rotary, KERNELS[kernel], use_reentrant=False)
            else:
                hidden = layer(hidden, rotary, KERNELS[kernel])
        return self.norm(hidden)
