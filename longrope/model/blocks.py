"""A Llama's layers on `longrope.ops`, in blocks of tokens.

Layer by layer, and in each layer block by block: a block's keys and values join those of the tokens
before it, un-rotated, its queries attend all of them, and its new states take the place of the old.
Besides the states only one layer's keys and values and one block's activations are alive, whatever
the length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor, nn

from longrope import ops
from longrope.factors import Tiers
from longrope.model.checks import IGNORED

#: Gives the rotation of queries at tokens `begin` to before `end`, and of all keys before `end`.
Rotations = Callable[[int, int], ops.Rotation]


class Pass:
    """A pass of inputs through a model, row by row (short rows together).

    Parameters
    ----------
    llama
        The weights, a `LlamaForCausalLM`.
    tiers
        Tiers by position.
    inputs
        Token ids `[B, N]` or embeddings `[B, N, E]`, on any device.
    block
        Tokens in a layer at a time.
    """

    def __init__(self, llama: nn.Module, tiers: Tiers, inputs: Tensor, block: int):
        self.llama, self.inputs, self.block = llama, inputs, block
        self.weight = llama.lm_head.weight
        batch, self.length = inputs.shape[:2]
        self.rotation = rotations(tiers, self.length, self.weight.device)
        together = max(1, block // self.length)
        self.rows = [slice(first, first + together) for first in range(0, batch, together)]
        self.parts = [slice(at, at + block) for at in range(0, self.length, block)]

    def hidden(self, dtype: torch.dtype) -> Tensor:
        """Return the states after the last norm `[B, N, E]`, where the inputs lie."""
        device = self.inputs.device
        if torch.is_grad_enabled():
            return torch.cat([self._states(rows) for rows in self.rows]).to(device, dtype)
        whole = self._empty(self.weight.shape[1], dtype)
        in_place = dtype == self.weight.dtype and device == self.weight.device
        for rows in self.rows:
            states = self._states(rows, whole[rows] if in_place else None)
            if not in_place:
                whole[rows] = states.to(device)
        return whole

    def logits(self, dtype: torch.dtype) -> Tensor:
        """Return the head's scores `[B, N, V]`, where the inputs lie."""
        device, head = self.inputs.device, self.llama.lm_head
        if torch.is_grad_enabled():
            return torch.cat([head(self._states(rows)) for rows in self.rows]).to(device, dtype)
        whole = self._empty(self.weight.shape[0], dtype)
        for rows in self.rows:
            states = self._states(rows)
            for part in self.parts:
                whole[rows, part] = head(states[:, part]).to(device)
        return whole

    def loss(self, labels: Tensor) -> Tensor:
        """Return the mean negative log-likelihood of labels int64 `[B, N]`, but of each first."""
        labels = labels[:, 1:]
        total = 0.0
        for rows in self.rows:
            states = self._states(rows)[:, :-1]
            targets = labels[rows].to(states.device)
            nll = ops.linear_nll(states.flatten(0, 1), self.weight, targets.flatten(), IGNORED)
            total = total + nll.sum()
        return total / (labels != IGNORED).sum().to(total.device)

    def _empty(self, width: int, dtype: torch.dtype) -> Tensor:
        return self.inputs.new_empty((*self.inputs.shape[:2], width), dtype=dtype)

    def _states(self, rows: slice, into: Tensor | None = None) -> Tensor:
        """Return the states of some rows after the last norm; without gradients in `into`."""
        base = self.llama.model
        inputs = self.inputs[rows].to(self.weight.device)
        embedded = inputs.is_floating_point()
        states = inputs.to(self.weight.dtype) if embedded else base.embed_tokens(inputs.long())
        if torch.is_grad_enabled():
            return base.norm(run_layers(base.layers, states, self.rotation))
        if into is not None:
            states = into.copy_(states)
        elif states.data_ptr() == self.inputs[rows].data_ptr():
            states = states.clone()  # the caller's own
        run_layers_(base.layers, states, self.rotation, self.block)
        for part in self.parts:
            states[:, part] = base.norm(states[:, part])
        return states


def check_shared(tiers: Tiers) -> None:
    """Refuse factors by layer and head, for which `rotations` has no place."""
    if any(tier.per_head for tier in tiers):
        raise ValueError(
            "tiers: expected factors for all layers and heads alike, got those of each; take their "
            "one_set(), or longrope.apply them to the Hugging Face model, `llama`"
        )


def rotations(tiers: Tiers, length: int, device: torch.device) -> Rotations:
    """Return the rotations of a sequence of `length` tokens under tiers by position.

    A single tier holds for every position.
    """

    def of_tiers(values: Iterable[object], dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(np.stack(list(values)), dtype=dtype, device=device)

    positions = torch.arange(length, device=device)
    shared = {
        "inv_freq": of_tiers((tier.inv_freq() for tier in tiers), torch.float64),
        "base_inv_freq": torch.from_numpy(tiers[0].base_inv_freq()).to(device),
        "start_tokens": of_tiers((tier.start_tokens for tier in tiers), torch.int64),
        "attention_factor": of_tiers((tier.attention_factor for tier in tiers), torch.float64),
        "limits": of_tiers(tiers.limits, torch.int64),
    }

    def rotation(begin: int, end: int) -> ops.Rotation:
        return ops.Rotation(
            query_positions=positions[begin:end], key_positions=positions[:end], **shared
        )

    return rotation


def run_layers_(
    layers: Iterable[nn.Module], states: Tensor, rotation: Rotations, block: int
) -> Tensor:
    """Run the layers over states `[B, N, E]`, in place, without gradients; returns the states.

    `block` is the number of tokens of each row that are in a layer at a time.
    """
    length = states.shape[1]
    keys = values = None
    with torch.no_grad():
        for layer in layers:
            for begin in range(0, length, block):
                end = min(begin + block, length)
                part = states[:, begin:end]
                query, key, value = _project(layer, part)
                if keys is None:  # of one shape in all layers
                    shape = (*key.shape[:2], length, key.shape[3])
                    keys, values = key.new_empty(shape), value.new_empty(shape)
                keys[:, :, begin:end], values[:, :, begin:end] = key, value
                attended = ops.attention(
                    query, keys[:, :, :end], values[:, :, :end], rotation=rotation(begin, end)
                )
                part.copy_(_finish(layer, part, attended))
    return states


def run_layers(layers: Iterable[nn.Module], states: Tensor, rotation: Rotations) -> Tensor:
    """As `run_layers_`, differentiable: fresh states, and whole rows in a layer at a time.

    Blocks would save nothing here: a backward pass needs the activations of all tokens.
    """
    length = states.shape[1]
    for layer in layers:
        query, key, value = _project(layer, states)
        attended = ops.attention(query, key, value, rotation=rotation(0, length))
        states = _finish(layer, states, attended)
    return states


def _project(layer: nn.Module, states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return un-rotated queries `[B, H, n, D]`, and keys and values `[B, Hk, n, D]`."""
    attention = layer.self_attn
    normed = layer.input_layernorm(states)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    query, key, value = (
        projection(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in projections
    )
    return query, key, value


def _finish(layer: nn.Module, states: Tensor, attended: Tensor) -> Tensor:
    """Return the states after a layer, from those before it and its attention `[B, H, n, D]`."""
    states = states + layer.self_attn.o_proj(attended.transpose(1, 2).flatten(2))
    return states + layer.mlp(layer.post_attention_layernorm(states))
