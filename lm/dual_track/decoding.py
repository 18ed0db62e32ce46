"""Fast step-by-step evaluation of the language model with its own key/value cache.

The same mathematics as `DualTrackLM.hidden_states`, written for one new step at a time, where the number of
operators counts: the weights of a layer are fused into four matrices as the products read them, the norms'
gains folded in, positions turn by one product, and keys and values live in buffers made once.
All candidates of a branch (with the source, or without it) hear the same prompt, whose keys are kept once and
met by the queries of all of them in one product.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from .backbone import EPSILON, Qwen2Backbone

# (number of the layer, queries and keys, values) -> the queries' mix; all [rows, steps, heads or groups,
# dim], queries and keys as complex numbers that are not turned to their positions yet
Attend = Callable[[int, Tensor, Tensor], Tensor]


class _Layer:
    """Fused weights of one Qwen2 layer, [inputs, outputs].

    States come divided by their norm, not by their root mean square: the weights make up for the width's
    root. They are one number wider (see `CachedDecoder._run`), which the weights pass by.
    """

    def __init__(self, layer: Any, head_dim: int, heads: int, groups: int) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        gain, root = layer.input_layernorm.weight, len(layer.input_layernorm.weight) ** 0.5
        scale = head_dim**-0.5  # of attention's scores; folded into the queries
        query, key, value = attention.q_proj, attention.k_proj, attention.v_proj
        joint = [_pair(scale * query.weight, heads), _pair(key.weight, groups), value.weight]
        self.attention_in = functional.pad((torch.cat(joint) * gain * root).T, (0, 0, 0, 1))
        joint = [_pair(scale * query.bias, heads), _pair(key.bias, groups), value.bias]
        self.attention_in_bias = torch.cat(joint)
        self.attention_out = functional.pad(attention.o_proj.weight.T, (0, 1))
        gain = layer.post_attention_layernorm.weight
        joint = [mlp.gate_proj.weight, mlp.up_proj.weight]
        self.mlp_in = functional.pad((torch.cat(joint) * gain * root).T, (0, 0, 0, 1))
        self.mlp_out = functional.pad(mlp.down_proj.weight.T, (0, 1))


def _pair(rows: Tensor, heads: int) -> Tensor:
    """Rows of queries' or keys' weights, those side by side that a position turns as one complex number.

    Scores are sums over a head, so its order is free as long as both have it.
    """
    return rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _as_complex(pairs: Tensor) -> Tensor:
    return torch.view_as_complex(pairs.unflatten(-1, (-1, 2)))


class _Step:
    """Buffers of one step of all rows, and views of them, made once: a view costs as much as a small product.

    by_group: [branches, groups, candidates, ...], as keys and values are kept.
    """

    def __init__(self, like: Tensor, sizes: tuple[int, int, int, int, int], wide: int, inner: int) -> None:
        """sizes: branches, candidates, groups, heads of a group, head_dim; wide, inner: of states, MLPs."""
        branches, candidates, groups, per_group, dim = sizes
        rows, heads = branches * candidates, groups * per_group
        self.state, self.normed = like.new_zeros(rows, wide), like.new_zeros(rows, wide)
        self.norm = like.new_zeros(rows, 1)
        self.joint = like.new_zeros(rows, (heads + 2 * groups) * dim)
        query, key, value = self.joint.view(branches, candidates, -1, dim).split([heads, groups, groups], 2)
        self.query_by_group = _as_complex(query).unflatten(2, (groups, per_group)).transpose(1, 2)
        self.key_by_group, self.value_by_group = _as_complex(key).transpose(1, 2), value.transpose(1, 2)
        self.query = like.new_zeros(branches, groups, candidates, per_group, dim)
        self.turned_query = _as_complex(self.query)
        # Read by the keys of a prompt, for all its candidates, and by those of each candidate.
        self.of_prompt, self.of_own = self.query.flatten(2, 3).flatten(0, 1), self.query.flatten(0, 2)
        self.heard = torch.zeros_like(self.of_own)
        self.heard_by_prompt = self.heard.view(self.of_prompt.shape)
        self.heard_by_row = self.heard.view(branches, groups, candidates, -1).transpose(1, 2)
        self.mixed = like.new_zeros(rows, heads * dim)
        self.mixed_by_row = self.mixed.view(branches, candidates, groups, -1)
        self.gates = like.new_zeros(rows, 2 * inner)
        self.gate, self.up = self.gates.chunk(2, dim=-1)

    def normalize(self) -> Tensor:
        """The state by its norm."""
        torch.linalg.vector_norm(self.state, dim=-1, keepdim=True, out=self.norm)
        return torch.div(self.state, self.norm, out=self.normed)


class CachedDecoder:
    """Takes the prompts of all branches in one pass, then advances every candidate of every branch.

    Rows are ordered by branch, then by candidate. Prompts begin at position 0; targets do so too where the
    model shares positions, and run on from the prompt where it does not.
    """

    @torch.no_grad()
    def __init__(
        self,
        backbone: Qwen2Backbone,
        *,
        shared_positions: bool,
        branches: int,
        candidates: int,
        prompt_steps: int,
        target_steps: int,
    ) -> None:
        """prompt_steps: the length of every prompt; target_steps: the most a target may have."""
        heads, groups = backbone.heads, backbone.groups
        self.branches, self.candidates = branches, candidates
        self.prompt_steps, self.target_steps, self.length = prompt_steps, target_steps, 0
        self.head_dim = backbone.dim // heads
        self._groups, self._per_group = groups, heads // groups
        self._layers = [_Layer(layer, self.head_dim, heads, groups) for layer in backbone.layers]
        weight, width = backbone.norm.weight, len(backbone.norm.weight)
        self._gain = functional.pad(weight * width**0.5, (0, 1))
        self._extra = (width * EPSILON) ** 0.5
        # Keys and values [layers, branches x groups, steps, head_dim] of prompts, [..., x candidates, ...] of
        # targets. A single candidate has both in one piece, which one kernel attends.
        of_prompts = (len(self._layers), branches * groups, prompt_steps, self.head_dim)
        of_targets = (len(self._layers), branches * groups * candidates, target_steps, self.head_dim)
        self._whole: tuple[Tensor, Tensor] | None = None
        if candidates == 1:
            whole = (*of_prompts[:2], 1, prompt_steps + target_steps, self.head_dim)
            self._whole = weight.new_zeros(whole), weight.new_zeros(whole)
            parts = [piece[:, :, 0].tensor_split([prompt_steps], dim=2) for piece in self._whole]
            (self._prompt_keys, self._keys), (self._prompt_values, self._values) = parts
        else:
            # Prompt keys lie as the products read them, transposed.
            self._prompt_keys = weight.new_zeros(*of_prompts[:2], self.head_dim, prompt_steps).mT
            self._prompt_values = weight.new_zeros(of_prompts)
            self._keys, self._values = weight.new_zeros(of_targets), weight.new_zeros(of_targets)
        by_group = (branches, groups, candidates)
        self._turned_keys = _as_complex(self._keys).unflatten(1, by_group)
        self._values_by_group = self._values.unflatten(1, by_group)
        self._step = _Step(
            weight,
            (branches, candidates, groups, self._per_group, self.head_dim),
            width + 1,
            backbone.feed_forward_dim,
        )
        self._step.state[:, -1] = self._extra
        self._target_start = 0 if shared_positions else prompt_steps
        positions = max(prompt_steps, self._target_start + target_steps)
        self._places = torch.arange(positions, device=weight.device)
        cosines, sines = (each.to(weight.dtype) for each in backbone.rotary(self._places))
        self._turns = torch.complex(cosines, sines)[:, : self.head_dim // 2]

    @torch.no_grad()
    def hear(self, hidden: Tensor, heard: Sequence[int] | None = None) -> Tensor:
        """Begin anew with prompts [k, steps, hidden_dim]; return their states.

        heard: which of them each of the first branches hears, None: each its own; later branches keep theirs.
        """
        count, steps, _ = hidden.shape
        heard = list(range(count)) if heard is None else heard
        assert len(heard) <= self.branches and steps == self.prompt_steps
        self.length = 0
        filled, places = len(heard) * self._groups, self._places[:steps]

        def attend(number: int, turned: Tensor, value: Tensor) -> Tensor:
            query, key = self._turn(turned, places)
            value = value.transpose(1, 2)
            self._prompt_keys[number, :filled] = key[heard].flatten(0, 1)
            self._prompt_values[number, :filled] = value[heard].flatten(0, 1)
            mixed = functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=1.0, enable_gqa=True
            )
            return mixed.transpose(1, 2)

        return self._run(hidden, attend)

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

        def attend(number: int, turned: Tensor, value: Tensor) -> Tensor:
            query, key = self._turn(turned, self._target_start + places)
            parts = (
                (self._prompt_keys[number], self._keys[number], key.transpose(1, 2)),
                (self._prompt_values[number], self._values[number], value),
            )
            everything = []
            for prompt, own, new in parts:
                new = new.unflatten(0, (self.branches, self.candidates)).permute(0, 3, 1, 2, 4)
                own[:, first:end] = new.reshape(-1, steps, self.head_dim)
                both = torch.cat([prompt.repeat_interleave(self.candidates, dim=0), own[:, :end]], dim=1)
                both = both.view(self.branches, self._groups, self.candidates, -1, self.head_dim)
                everything.append(both.transpose(1, 2).flatten(0, 1))  # [rows, groups, steps, head_dim]
            mixed = functional.scaled_dot_product_attention(
                query, *everything, attn_mask=seen, scale=1.0, enable_gqa=True
            )
            return mixed.transpose(1, 2)

        return self._run(hidden, attend)

    def step(self, hidden: Tensor, place: Tensor, reach: int | None = None) -> Tensor:
        """Take the step [rows, 1, hidden_dim] at place [1] of the targets; return its states, normed.

        reach: place + 1, where that is known without asking the device. None: the whole buffers are attended
        behind a mask, so that every step is the same work on the same memory, as a CUDA graph needs it.
        """
        one, prompt = self._step, self.prompt_steps
        turn = self._turns.index_select(0, self._target_start + place)
        keys, values = self._keys.mT, self._values
        key_slots = value_slots = ahead = None
        if reach is None:
            ahead = hidden.new_zeros(self.target_steps)
            ahead.masked_fill_(self._places[: self.target_steps] > place, -torch.inf)
        else:
            key_slots = self._turned_keys.select(4, reach - 1).unbind()
            value_slots = self._values_by_group.select(4, reach - 1).unbind()
            keys, values = keys.narrow(3, 0, reach), values.narrow(2, 0, reach)
            if self._whole is not None:
                keys, values = (piece.narrow(3, 0, prompt + reach) for piece in self._whole)
        keys, values = keys.unbind(), values.unbind()
        prompt_keys, prompt_values = self._prompt_keys.mT.unbind(), self._prompt_values.unbind()
        one.state[:, :-1] = hidden[:, 0]
        for number, layer in enumerate(self._layers):
            torch.addmm(layer.attention_in_bias, one.normalize(), layer.attention_in, out=one.joint)
            torch.mul(one.query_by_group, turn, out=one.turned_query)
            if key_slots is not None and value_slots is not None:
                torch.mul(one.key_by_group, turn, out=key_slots[number])
                value_slots[number].copy_(one.value_by_group)
            else:
                key = torch.view_as_real(one.key_by_group * turn).flatten(-2).flatten(0, 2)
                self._keys[number].index_copy_(1, place, key[:, None])
                self._values[number].index_copy_(1, place, one.value_by_group.flatten(0, 2)[:, None])
            if self._whole is not None and ahead is None:
                mixed = functional.scaled_dot_product_attention(
                    one.of_own[:, None], keys[number], values[number], scale=1.0
                ).view(one.mixed.shape)
            else:
                heard = torch.bmm(one.of_prompt, prompt_keys[number]).view(*one.of_own.shape[:2], prompt)
                own = torch.bmm(one.of_own, keys[number])
                if ahead is not None:
                    own = own + ahead
                weights = torch.cat([heard, own], dim=-1).softmax(dim=-1)
                of_prompt = weights[..., :prompt].reshape(*one.of_prompt.shape[:2], prompt)
                torch.bmm(of_prompt, prompt_values[number], out=one.heard_by_prompt)
                one.heard.baddbmm_(weights[..., prompt:], values[number])
                one.mixed_by_row.copy_(one.heard_by_row)
                mixed = one.mixed
            one.state.addmm_(mixed, layer.attention_out)  # and the residual
            torch.mm(one.normalize(), layer.mlp_in, out=one.gates)
            one.state.addmm_(functional.silu(one.gate, inplace=True).mul_(one.up), layer.mlp_out)
        return (one.normalize() * self._gain)[:, None, :-1]

    def _run(self, hidden: Tensor, attend: Attend) -> Tensor:
        """All layers on steps [rows, steps, hidden_dim]; normed."""
        rows, steps, _ = hidden.shape
        heads, groups = self._groups * self._per_group, self._groups
        # One number more makes the norm what RMSNorm divides by, with its epsilon, times the width's root.
        hidden = functional.pad(hidden.flatten(0, 1), (0, 1), value=self._extra)
        for number, layer in enumerate(self._layers):
            joint = torch.addmm(layer.attention_in_bias, _normalize(hidden), layer.attention_in)
            joint = joint.view(rows, steps, heads + 2 * groups, self.head_dim)
            turned, value = joint.split([heads + groups, groups], dim=2)
            mixed = attend(number, _as_complex(turned), value).reshape(rows * steps, -1)
            hidden.addmm_(mixed, layer.attention_out)  # and the residual
            gate, up = torch.mm(_normalize(hidden), layer.mlp_in).chunk(2, dim=-1)
            hidden.addmm_(functional.silu(gate, inplace=True).mul_(up), layer.mlp_out)
        return (_normalize(hidden) * self._gain)[:, :-1].view(rows, steps, -1)

    def _turn(self, turned: Tensor, positions: Tensor) -> list[Tensor]:
        """Complex queries and keys of some steps -> both at their positions, [rows, heads, steps, dim]."""
        turned = torch.view_as_real(turned * self._turns[positions][:, None]).flatten(-2).transpose(1, 2)
        return list(turned.split([self._groups * self._per_group, self._groups], dim=1))


def _normalize(hidden: Tensor) -> Tensor:
    return hidden / torch.linalg.vector_norm(hidden, dim=-1, keepdim=True)
