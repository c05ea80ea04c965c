"""Attention by `ops.attention` in the layers of a Hugging Face model, for the time of a block.

transformers' attention layers look up the function that they run by the name in the model's
`config._attn_implementation`. Ours is registered as "longrope"; `kernel_attention` switches a model
to it and back. Queries and keys arrive rotated; keys and values have their own number of heads, and
those in the cache come first.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longrope import ops
from longrope._native import _C
from longrope.patching.models import decoder
from longrope.patching.rotation import DEVICES_WITH_KERNELS
from longrope.patching.settings import rope_settings
from longrope.patching.tiers import arguments_of

#: What the function is called in transformers' `AttentionInterface`.
NAME = "longrope"
#: What the kernels take.
LARGEST_HEAD_DIM = _C.MAX_HEAD_DIM
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

#: Attribute of an attention layer: what it runs inside the block.
_ATTEND = "_longrope_attend"


@contextlib.contextmanager
def kernel_attention(
    model: nn.Module, attend: Callable[..., Tensor] | None = None
) -> Iterator[None]:
    """Inside the block the model's attention layers run `attend`, `ops.attention` unless given.

    A model whose device, dtype or head_dim the kernels do not take, or whose layers do not look
    their attention up in transformers' `AttentionInterface`, keeps its own
    (`has_kernel_attention` tells). After the block, also where it ends in an exception, every model
    has its own again.

    A backward pass through activation checkpoints runs the layers again: keep it inside the block.

    Parameters
    ----------
    model
        A Hugging Face model.
    attend
        Called as `attend(q, k, v, causal=, window=, scale=, softcap=)` with rotated q
        `[B, H, N, D]` and k, v `[B, Hk, M, D]`, of which the queries are the last `N` positions;
        returns `[B, H, N, D]`. The keywords mean what they mean in `ops.attention`.

    Raises
    ------
    ValueError
        From a forward pass inside the block: where `attention_mask` hides a token, the cache is one
        of fixed size, whose unused room would be attended, or dropout is on.
    """
    if not has_kernel_attention(model):
        yield
        return
    _register()
    base = decoder(model)
    layers = [layer.self_attn for layer in base.layers]
    # Usually one object for all.
    configs = list({id(c): c for c in (base.config, *(layer.config for layer in layers))}.values())
    own_names = [config._attn_implementation for config in configs]
    own_functions = [layer.__dict__.get(_ATTEND) for layer in layers]
    hook = base.register_forward_pre_hook(_check_call, with_kwargs=True)
    try:
        for config in configs:
            config._attn_implementation = NAME
        for layer in layers:
            # Not by setattr: a module given as `attend` would become a child of the layer.
            layer.__dict__[_ATTEND] = ops.attention if attend is None else attend
        yield
    finally:
        hook.remove()
        for config, name in zip(configs, own_names, strict=True):
            config._attn_implementation = name
        for layer, function in zip(layers, own_functions, strict=True):
            if function is None:
                layer.__dict__.pop(_ATTEND, None)
            else:
                layer.__dict__[_ATTEND] = function


def has_kernel_attention(model: nn.Module) -> bool:
    """Say whether `kernel_attention` has an effect on a model."""
    try:
        base = decoder(model)
        head_dim = rope_settings(base).head_dim
    except (AttributeError, TypeError, ValueError):  # no model that longrope.apply takes
        return False
    parameter = next(base.parameters())
    device, dtype = parameter.device.type, parameter.dtype
    return (
        device in DEVICES_WITH_KERNELS
        and (dtype in DTYPES or (dtype, device) == (torch.float64, "cpu"))
        and head_dim <= LARGEST_HEAD_DIM
        and all(map(_uses_interface, base.layers))
    )


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers asks for it; returns `[B, N, H, D]` and no weights."""
    if attention_mask is not None:
        raise ValueError(
            "attention_mask: expected none, or one of ones [B, M], inside kernel_attention, got "
            f"{type(attention_mask).__name__} {list(getattr(attention_mask, 'shape', []))}"
        )
    if dropout:
        raise ValueError(
            f"dropout: expected 0 inside kernel_attention (model.eval()), got {dropout}"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    attend = module.__dict__.get(_ATTEND, ops.attention)
    out = attend(
        query, key, value, causal=is_causal, window=sliding_window, scale=scaling, softcap=softcap
    )
    return out.transpose(1, 2), None


@functools.cache
def _register() -> None:
    """Make the function known to transformers, which `import longrope` alone does not import."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def _uses_interface(layer: nn.Module) -> bool:
    attention = getattr(layer, "self_attn", None)
    file = sys.modules.get(type(attention).__module__)
    return hasattr(file, "ALL_ATTENTION_FUNCTIONS") and hasattr(attention, "config")


def _check_call(base: nn.Module, args: tuple, kwargs: dict) -> None:
    """Refuse what would not reach `attention_forward`: transformers makes no mask for its name."""
    given = arguments_of(args, kwargs)
    mask, cache = given.get("attention_mask"), given.get("cache")
    if isinstance(mask, Tensor) and mask.ndim == 2 and not mask.all():
        raise ValueError(
            "attention_mask: expected one that hides no token inside kernel_attention, got "
            f"{int((mask == 0).sum())} hidden of {mask.numel()}"
        )
    if getattr(cache, "is_compileable", False):
        raise ValueError(
            "cache: expected one that holds no more than the tokens so far inside "
            f"kernel_attention, got {type(cache).__name__} of fixed size"
        )
