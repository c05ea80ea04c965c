"""The cache of a model with one set of factors is read under that set only.

Keys lie in a cache as they were turned. One that was filled before `longrope.apply`, under other
factors or before `longrope.remove` would give attention over keys of mixed rotations, silently:
its layers are marked when a model fills them, and refuse to be read otherwise. Tiers know the
factors of cached keys, and follow them.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors
from longrope.patching.tier_pass import arguments_of


def install(base: nn.Module, factors: RescaleFactors) -> tuple[Any, Any]:
    """Make a decoder mark the caches that it fills, and refuse others; returns the hooks."""
    signature = hashlib.sha256(repr(factors.as_fields()).encode()).hexdigest()
    return (
        base.register_forward_pre_hook(functools.partial(_open, signature), with_kwargs=True),
        base.register_forward_hook(
            functools.partial(_close, signature), with_kwargs=True, always_call=True
        ),
    )


def _open(signature: str, base: nn.Module, args: tuple, kwargs: dict) -> None:
    if torch.compiler.is_compiling() or base.rotary_emb.rows is not None:
        return
    for layer in _layers(arguments_of(args, kwargs).get("cache")):
        if getattr(layer, "signature", None) != signature:
            if layer.is_initialized and int(layer.get_seq_length()):
                raise ValueError(
                    "cache: expected an empty cache, or one that was filled under the factors that "
                    "are applied, got keys of another rotation"
                )
            _mark(layer, signature)
        layer.is_open = True


def _close(signature: str, base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    if torch.compiler.is_compiling() or base.rotary_emb.rows is not None:
        return
    made = output if isinstance(output, tuple) else getattr(output, "values", tuple)()
    for cache in (arguments_of(args, kwargs).get("cache"), *made):
        for layer in _layers(cache):
            if getattr(layer, "signature", None) is None:
                _mark(layer, signature)  # of a cache that the decoder has made itself
            layer.is_open = False


def _layers(cache: Any) -> list[Any]:
    """Return the layers of a cache that hold keys; none of anything else."""
    layers = getattr(cache, "layers", None)
    if not isinstance(layers, list):
        return []
    return [layer for layer in layers if hasattr(layer, "keys") and hasattr(layer, "update")]


def _mark(layer: Any, signature: str) -> None:
    if not getattr(type(layer), "is_marked", False):
        layer.__class__ = _marked(type(layer))
    layer.signature = signature


@functools.cache
def _marked(kind: type) -> type:
    """Return a type of cache layer that is read only while its model runs, by the same name."""

    def update(self: Any, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
        if not (getattr(self, "is_open", True) or torch.compiler.is_compiling()):
            raise ValueError(
                "cache: expected one that was filled without rescale factors, got keys of a model "
                "with factors applied; start from an empty cache after longrope.remove"
            )
        return kind.update(self, key_states, value_states, *args, **kwargs)

    return type(kind.__name__, (kind,), {"update": update, "is_marked": True})
