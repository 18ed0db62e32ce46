"""Fast step-by-step evaluation of the language model with its own key/value cache.

The same mathematics as `DualTrackLM.hidden_states`, written for one new step at a time: the weights of a
layer are fused into four matrices, the norms' gains folded in, and keys and values live in buffers made once.
All candidates of a branch (with the source, or without it) hear the same prompt, whose keys are kept once and
met by the queries of all of them in one product.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import Qwen2Model

# (number of the layer, queries, keys, values), each [rows, steps, heads or groups, head_dim] -> queries' mix
Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]


class _Layer:
    """Fused weights of one Qwen2 layer."""

    def __init__(self, layer: Any, head_dim: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        gain = layer.input_layernorm.weight
        scale = head_dim**-0.5  # of attention's scores; folded into the queries
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        self.attention_in = torch.cat([scale * query.weight, key.weight, value.weight]) * gain
        self.attention_in_bias = torch.cat([scale * query.bias, key.bias, value.bias])
        self.attention_out = attention.o_proj.weight
        gain = layer.post_attention_layernorm.weight
        self.mlp_in = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]) * gain
        self.mlp_out = mlp.down_proj.weight


class _Cache:
    """What one layer remembers; batch: branches times groups of heads that share keys."""

    def __init__(
        self, like: Tensor, batch: int, candidates: int, steps: tuple[int, int], head_dim: int
    ) -> None:
        prompt, target = steps
        if candidates == 1:  # prompt and target lie in one piece, which one kernel attends
            self.all_keys, self.all_values = (
                like.new_zeros(batch, 1, prompt + target, head_dim) for _ in range(2)
            )
            self.prompt_keys, self.keys = self.all_keys[:, 0, :prompt].mT, self.all_keys[:, 0, prompt:]
            self.prompt_values, self.values = self.all_values[:, 0].tensor_split([prompt], dim=1)
            return
        # Prompt keys lie as the products read them, [head_dim, steps].
        self.prompt_keys = like.new_zeros(batch, head_dim, prompt)
        self.prompt_values = like.new_zeros(batch, prompt, head_dim)
        self.keys = like.new_zeros(batch * candidates, target, head_dim)
        self.values = like.new_zeros(batch * candidates, target, head_dim)


class CachedDecoder:
    """Takes the prompts of all branches in one pass, then advances every candidate of every branch.

    Rows are ordered by branch, then by candidate. Prompts begin at position 0; targets do so too where the
    model shares positions, and run on from the prompt where it does not.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Qwen2Model,
        *,
        shared_positions: bool,
        branches: int,
        candidates: int,
        prompt_steps: int,
        target_steps: int,
    ) -> None:
        """prompt_steps: the length of every prompt; target_steps: the most a target may have."""
        config = backbone.config
        heads, groups = int(config.num_attention_heads or 0), int(config.num_key_value_heads or 0)
        self.branches, self.candidates = branches, candidates
        self.prompt_steps, self.target_steps, self.length = prompt_steps, target_steps, 0
        self.head_dim = int(config.hidden_size or 0) // heads
        self._groups, self._per_group = groups, heads // groups
        self._layers = [_Layer(layer, self.head_dim) for layer in backbone.layers]
        self._norm = backbone.norm
        weight = self._norm.weight
        self._epsilon = torch.tensor(self._norm.variance_epsilon, device=weight.device)
        batch, steps = branches * self._groups, (prompt_steps, target_steps)
        self._caches = [_Cache(weight, batch, candidates, steps, self.head_dim) for _ in self._layers]
        self._target_start = 0 if shared_positions else prompt_steps
        positions = max(prompt_steps, self._target_start + target_steps)
        self._places = torch.arange(positions, device=weight.device)
        cos, sin = backbone.rotary_emb(weight, self._places[None])
        half = self.head_dim // 2
        # rotate_half(x) * sin equals x rolled by half a head times the signed sine.
        self._cos, self._sin = cos[0], torch.cat([-sin[0, :, :half], sin[0, :, half:]], dim=-1)

    @torch.no_grad()
    def hear(self, hidden: Tensor) -> Tensor:
        """Begin anew with prompts [k, steps, hidden_dim] of the first k branches; return their states."""
        count, steps, _ = hidden.shape
        assert count <= self.branches and steps == self.prompt_steps
        self.length = 0

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            query, key, value = (part.transpose(1, 2) for part in (query, key, value))
            cache, filled = self._caches[number], count * self._groups
            cache.prompt_keys[:filled] = key.mT.flatten(0, 1)
            cache.prompt_values[:filled] = value.flatten(0, 1)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=1.0, enable_gqa=True
            )
            return mixed.transpose(1, 2)

        return self._run(hidden, self._places[:steps], attend)

    @torch.no_grad()
    def advance(self, hidden: Tensor) -> Tensor:
        """Take the next steps [rows, steps, hidden_dim] of the targets; return their states, normed."""
        rows, steps, _ = hidden.shape
        first, end = self.length, self.length + steps
        assert rows == self.branches * self.candidates and end <= self.target_steps
        self.length = end
        places = self._places[first:end]
        if steps == 1:
            return self.step(hidden, places, end)
        # Each step sees the prompt, the past and the new steps up to itself.
        seen = torch.ones(steps, self.prompt_steps + end, dtype=torch.bool, device=hidden.device)
        seen = seen.tril(diagonal=self.prompt_steps + first)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self._caches[number]
            parts = ((cache.prompt_keys.mT, cache.keys, key), (cache.prompt_values, cache.values, value))
            everything = []
            for prompt, own, new in parts:
                own[:, first:end] = self._by_group(new)
                both = torch.cat([prompt.repeat_interleave(self.candidates, dim=0), own[:, :end]], dim=1)
                both = both.view(self.branches, self._groups, self.candidates, -1, self.head_dim)
                everything.append(both.transpose(1, 2).flatten(0, 1))  # [rows, groups, steps, head_dim]
            mixed = functional.scaled_dot_product_attention(
                query.transpose(1, 2), *everything, attn_mask=seen, scale=1.0, enable_gqa=True
            )
            return mixed.transpose(1, 2)

        return self._run(hidden, self._target_start + places, attend)

    @torch.no_grad()
    def step(self, hidden: Tensor, place: Tensor, reach: int | None = None) -> Tensor:
        """Take the step [rows, 1, hidden_dim] at place [1] of the targets; return its states, normed.

        reach: place + 1, where that is known without asking the device. None: the whole buffers are attended
        behind a mask, so that every step is the same work on the same memory, as a CUDA graph needs it.
        """
        batch, prompt = self.branches * self._groups, self.prompt_steps
        ahead = None
        if reach is None:
            ahead = hidden.new_zeros(self.target_steps)
            ahead.masked_fill_(self._places[: self.target_steps] > place, -torch.inf)

        def attend(number: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            cache = self._caches[number]
            cache.keys.index_copy_(1, place, self._by_group(key))
            cache.values.index_copy_(1, place, self._by_group(value))
            # One row of queries per candidate and query head of a group; no mask, no copies of the keys.
            query = self._by_group(query)  # [batch and candidates, heads of a group, head_dim]
            if self.candidates == 1 and reach is not None:
                keys, values = (
                    cache.all_keys[:, :, : prompt + reach],
                    cache.all_values[:, :, : prompt + reach],
                )
                mixed = functional.scaled_dot_product_attention(query[:, None], keys, values, scale=1.0)
                return mixed.view(self.branches, 1, 1, -1)
            heard = torch.bmm(query.reshape(batch, -1, self.head_dim), cache.prompt_keys)
            own = torch.bmm(query, cache.keys[:, :reach].mT)
            if ahead is not None:
                own = own + ahead
            weights = torch.cat([heard.view(*own.shape[:2], prompt), own], dim=-1).softmax(dim=-1)
            mixed = torch.bmm(weights[..., :prompt].reshape(batch, -1, prompt), cache.prompt_values)
            mixed = torch.baddbmm(mixed.view(query.shape), weights[..., prompt:], cache.values[:, :reach])
            return mixed.view(self.branches, self._groups, self.candidates, -1).transpose(1, 2)

        return self._run(hidden, self._target_start + place, attend)

    def _run(self, hidden: Tensor, places: Tensor, attend: Attend) -> Tensor:
        """All layers on steps [rows, steps, hidden_dim] at positions [steps]; normed."""
        rows, steps, _ = hidden.shape
        heads, groups = self._groups * self._per_group, self._groups
        cos, sin = self._cos[places][:, None], self._sin[places][:, None]
        hidden = hidden.flatten(0, 1)
        for number, layer in enumerate(self._layers):
            joint = functional.linear(self._normalize(hidden), layer.attention_in, layer.attention_in_bias)
            joint = joint.view(rows, steps, heads + 2 * groups, self.head_dim)
            turned, value = joint.split([heads + groups, groups], dim=2)
            turned = torch.addcmul(turned * cos, turned.roll(self.head_dim // 2, dims=-1), sin)
            query, key = turned.split([heads, groups], dim=2)
            mixed = attend(number, query, key, value).reshape(rows * steps, -1)
            hidden = torch.addmm(hidden, mixed, layer.attention_out.mT)  # and the residual
            gate, up = functional.linear(self._normalize(hidden), layer.mlp_in).chunk(2, dim=-1)
            hidden = torch.addmm(hidden, functional.silu(gate) * up, layer.mlp_out.mT)
        return (self._normalize(hidden) * self._norm.weight).view(rows, steps, -1)

    def _normalize(self, hidden: Tensor) -> Tensor:
        # Root mean square by the vector norm, which one kernel computes: rms_norm takes twice as long here.
        norm = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.addcmul(self._epsilon, norm, norm, value=1 / hidden.shape[-1]).rsqrt()
        return hidden * scale.to(hidden.dtype)

    def _by_group(self, part: Tensor) -> Tensor:
        """[rows, steps, heads, dim] -> [branches, groups and candidates, steps x heads of a group, dim]."""
        rows, steps, heads, _ = part.shape
        part = part.view(self.branches, self.candidates, steps, self._groups, -1, self.head_dim)
        per_group = heads // self._groups
        return part.permute(0, 3, 1, 2, 4, 5).reshape(-1, steps * per_group, self.head_dim)
