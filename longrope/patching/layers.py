"""Rotations that differ between layers: each attention layer picks its own.

A model's rotary module runs once for all layers. Where its factors differ between them, it hands
over the rotations of all layers at once, and a hook in front of each attention layer picks the
layer's own.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from longrope.factors import RescaleFactors
from longrope.patching.families import attention_layers
from longrope.patching.settings import text_config


def install(base: nn.Module) -> tuple[Any, ...]:
    """Make every attention layer of a decoder pick its own rotation; returns the hooks."""
    return tuple(
        attention.register_forward_pre_hook(functools.partial(_pick, index), with_kwargs=True)
        for index, attention in enumerate(attention_layers(base))
    )


def layers_and_heads(base: nn.Module) -> tuple[int, int]:
    """Return how many attention layers a decoder has, and how many key/value heads each."""
    config = text_config(base)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return len(attention_layers(base)), heads


def check_heads(base: nn.Module, factors: RescaleFactors) -> None:
    """Raise `ValueError` where factors by layer and head are those of another model."""
    if not factors.per_head:
        return
    layers, heads = layers_and_heads(base)
    if factors.heads[0] != layers or factors.heads[1] not in (1, heads):
        raise ValueError(
            f"factors: expected lambdas [{layers}, {heads} or 1, R/2], by layer and key/value "
            f"head of the model, got {list(factors.lambdas.shape)}"
        )


def _pick(index: int, attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    given = kwargs.get("position_embeddings")
    if isinstance(given, tuple) and given and hasattr(given[0], "of_layer"):
        picked = (given[0].of_layer(index), *given[1:])
        return args, {**kwargs, "position_embeddings": picked}
    for place, value in enumerate(args):  # layers that are called with positions
        if isinstance(value, tuple) and value and hasattr(value[0], "of_layer"):
            picked = (value[0].of_layer(index), *value[1:])
            return (*args[:place], picked, *args[place + 1 :]), kwargs
    return None
