"""Fast step-by-step evaluation of the language model with its own key/value cache.

The same mathematics as `DualTrackLM.hidden_states`, written for one new step at a time: the weights of a
layer are fused into four matrices, the norms' gains folded in, and keys and values live in buffers made once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .model import DualTrackLM


class _Layer:
    """Fused weights of one Qwen2 layer."""

    def __init__(self, layer: Any, heads: int, key_value_heads: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        gain = layer.input_layernorm.weight
        # The query heads of a group attend one key head as if they were steps of it; 1/sqrt(d) is SDPA's.
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.attention_in = torch.cat([part.weight for part in parts]) * gain
        self.attention_in_bias = torch.cat([part.bias for part in parts])
        self.attention_out = attention.o_proj.weight
        gain = layer.post_attention_layernorm.weight
        self.mlp_in = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * gain
        self.mlp_out = mlp.down_proj.weight
        self.heads, self.key_value_heads = heads, key_value_heads


class CachedDecoder:
    """Advances rows of step inputs [rows, steps, hidden_dim] through the backbone, remembering the past."""

    @torch.no_grad()
    def __init__(self, lm: DualTrackLM, rows: int, capacity: int) -> None:
        """rows: sequences side by side; capacity: the most steps a sequence may have."""
        config = lm.config
        self.rows, self.capacity, self.length = rows, capacity, 0
        self.head_dim = config.hidden_dim // config.heads
        self._layers = [_Layer(layer, config.heads, config.key_value_heads) for layer in lm.backbone.layers]
        self._norm = lm.backbone.norm
        self._epsilon = self._norm.variance_epsilon
        weight = lm.project.weight
        shape = (config.layers, 2, rows, config.key_value_heads, capacity, self.head_dim)
        self._cache = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        # Each sequence has at most one position per step.
        positions = torch.arange(capacity, device=weight.device)[None]
        cos, sin = lm.backbone.rotary_emb(self._cache, positions)
        half = self.head_dim // 2
        # rotate_half(x) * sin equals x rolled by half a head times the signed sine.
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    def reset(self) -> None:
        """Forget the past."""
        self.length = 0

    @torch.no_grad()
    def advance(self, hidden: Tensor, first_position: int) -> Tensor:
        """Take steps [rows, steps, hidden_dim] at consecutive positions; return their states, normed."""
        rows, steps, _ = hidden.shape
        assert rows == self.rows and self.length + steps <= self.capacity
        cos = self._cos[first_position : first_position + steps, None]
        sin = self._sin[first_position : first_position + steps, None]
        for number, layer in enumerate(self._layers):
            hidden = hidden + self._attend(layer, self._cache[number], self._normalize(hidden), cos, sin)
            gate, up = functional.linear(self._normalize(hidden), layer.mlp_in).chunk(2, dim=-1)
            hidden = hidden + functional.linear(functional.silu(gate) * up, layer.mlp_out)
        self.length += steps
        return self._normalize(hidden) * self._norm.weight

    def _normalize(self, hidden: Tensor) -> Tensor:
        return functional.rms_norm(hidden, hidden.shape[-1:], eps=self._epsilon)

    def _attend(self, layer: _Layer, cache: Tensor, hidden: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        rows, steps, _ = hidden.shape
        groups = layer.key_value_heads
        joint = functional.linear(hidden, layer.attention_in, layer.attention_in_bias)
        joint = joint.view(rows, steps, layer.heads + 2 * groups, self.head_dim)
        turned, value = joint.split([layer.heads + groups, groups], dim=2)
        turned = turned * cos + turned.roll(self.head_dim // 2, dims=-1) * sin
        query, key = turned.split([layer.heads, groups], dim=2)
        end = self.length + steps
        cache[0, :, :, self.length : end] = key.transpose(1, 2)
        cache[1, :, :, self.length : end] = value.transpose(1, 2)
        keys, values = cache[0, :, :, :end], cache[1, :, :, :end]
        if steps == 1:
            # The query heads that share a key head go side by side: no mask, no copies of the keys.
            query = query.reshape(rows, groups, layer.heads // groups, self.head_dim)
            mixed = functional.scaled_dot_product_attention(query, keys, values)
            mixed = mixed.reshape(rows, 1, -1)
        else:
            mask = self._mask(steps, hidden.device)
            mixed = functional.scaled_dot_product_attention(
                query.transpose(1, 2), keys, values, attn_mask=mask, enable_gqa=True
            )
            mixed = mixed.transpose(1, 2).reshape(rows, steps, -1)
        return functional.linear(mixed, layer.attention_out)

    def _mask(self, steps: int, device: torch.device) -> Tensor:
        """Return [steps, length + steps] bool: a step sees the past and the new steps up to itself."""
        seen = torch.ones(steps, self.length + steps, dtype=torch.bool, device=device)
        return seen.tril(diagonal=self.length)
