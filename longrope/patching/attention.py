"""Attention in the layers of a Hugging Face model: what is registered with transformers.

transformers' attention layers look up the function that they run, and the mask that it gets, by the
name in the model's `config._attn_implementation`. Ours are registered under two kinds of names:

* `"longrope"` runs `plain_attention.attend` (or another function) in every layer, for the time of
  a `kernel_attention` block. No mask is made.
* `"longrope_sdpa"`, `"longrope_eager"` and so on are a model under tiers by position: what is left
  to the model goes to its own implementation, named behind the underscore, with the mask that this
  one asks for; everything else goes to `tier_attention`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longrope._native import _C
from longrope.patching import plain_attention, tier_compiled
from longrope.patching.families import attention_layers, decoder, family_of, file_of
from longrope.patching.rotation import DEVICES_WITH_KERNELS
from longrope.patching.settings import rope_settings
from longrope.patching.tier_attention import attend
from longrope.patching.tier_cache import Cached, stays_as_loaded
from longrope.patching.tier_pass import PREFIX, arguments_of
from longrope.patching.tier_rotation import Unturned
from longrope.patching.tiered import TieredRotaryEmbedding, module_of
from longrope.patching.torch_attention import Options
from longrope.patching.wrappers import device_of, dtype_of

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
    """Inside the block the model's attention layers run `attend`.

    Unless it is given they run `ops.attention`, on a GPU only where that is measured to be ahead of
    torch's kernels or they cannot do the same (`longrope.patching.plain_attention`).

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
    base = decoder(model)
    if isinstance(base.rotary_emb, TieredRotaryEmbedding):
        if attend is not None:
            raise ValueError("attend: expected none for a model under tiers by position")
        yield  # its attention is ours already
        return
    _register()
    layers = attention_layers(base)
    configs = _configs(base)
    own_names = [config._attn_implementation for config in configs]
    own_functions = [layer.__dict__.get(_ATTEND) for layer in layers]
    hook = base.register_forward_pre_hook(_check_call, with_kwargs=True)
    try:
        for config in configs:
            config._attn_implementation = NAME
        for layer in layers:
            # Not by setattr: a module given as `attend` would become a child of the layer.
            layer.__dict__[_ATTEND] = plain_attention.attend if attend is None else attend
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
    device, dtype = device_of(model).type, dtype_of(model)
    return (
        device in DEVICES_WITH_KERNELS
        and (dtype in DTYPES or (dtype, device) == (torch.float64, "cpu"))
        and head_dim <= LARGEST_HEAD_DIM
        and family_of(base).kernels
        and all(map(uses_interface, attention_layers(base)))
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
    attend = module.__dict__.get(_ATTEND, plain_attention.attend)
    out = attend(
        query, key, value, causal=is_causal, window=sliding_window, scale=scaling, softcap=softcap
    )
    return out.transpose(1, 2), None


@functools.cache
def _register() -> None:
    """Make the function known to transformers, which `import longrope` alone does not import."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def uses_interface(attention: nn.Module) -> bool:
    """Say whether an attention layer looks its function up in `AttentionInterface`."""
    return hasattr(file_of(attention), "ALL_ATTENTION_FUNCTIONS") and hasattr(attention, "config")


def _configs(base: nn.Module) -> list[Any]:
    """Return the configurations in which layers look; usually one object for all."""
    found = (base.config, *(layer.config for layer in attention_layers(base)))
    return list({id(config): config for config in found}.values())


# --- tiers by position ----------------------------------------------------------------------


def check_tiered_attention(
    base: nn.Module, instead: str = 'one set of factors, and tiers="row", work'
) -> None:
    """Raise `ValueError` where the layers of a decoder cannot attend under tiers by position.

    They may do more around their attention, not look it up, or be none that the kernels take;
    `instead` says what works.
    """
    family = family_of(base)
    if not family.tiers:
        raise ValueError(
            "model: expected a family whose attention tiers by position can take the place of, got "
            f"{family.name}, which does more around it; {instead}"
        )
    for attention in attention_layers(base):
        if not uses_interface(attention):
            raise ValueError(
                "model: expected attention layers that look their function up in transformers' "
                f"AttentionInterface for tiers by position, got {type(attention).__name__}; "
                f"{instead}"
            )
    head_dim = rope_settings(base).head_dim
    if head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            f"model: expected a head_dim of at most {LARGEST_HEAD_DIM} for tiers by position, got "
            f"{head_dim}; {instead}"
        )


def use_tiered_attention(base: nn.Module) -> None:
    """Make the layers of a decoder run attention under tiers by position, until the undoing.

    Raises `ValueError` where they cannot.
    """
    check_tiered_attention(base)
    for config in _configs(base):
        name = config._attn_implementation or "eager"
        if not name.startswith(PREFIX):
            _register_tiered(name)
            config._attn_implementation = PREFIX + name


def register_again(config: Any) -> None:
    """Make known what a model under tiers names, in a process that has got it from another one."""
    name = config._attn_implementation or ""
    if name.startswith(PREFIX):
        _register_tiered(name.removeprefix(PREFIX))


def use_own_attention(base: nn.Module) -> None:
    """Undo `use_tiered_attention`."""
    for config in _configs(base):
        config._attn_implementation = (config._attn_implementation or "").removeprefix(PREFIX)


@functools.cache
def _register_tiered(name: str) -> None:
    """Make attention and mask known to transformers for a model's own implementation `name`."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(PREFIX + name, functools.partial(_tiered_forward, name))
    AttentionMaskInterface.register(PREFIX + name, functools.partial(_tiered_mask, name))


def _tiered_forward(
    name: str,
    module: nn.Module,
    query: Any,
    key: Any,
    value: Tensor,
    attention_mask: Any,
    *args: Any,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend as transformers asks for it, `[B, N, H, D]`."""
    if isinstance(query, Unturned):
        if isinstance(key, Tensor):  # a layer that stays as loaded, whose cache has turned the keys
            query = query.turned_by_model()
        elif isinstance(key, Unturned) and stays_as_loaded(module, key.rotation.first_limit):
            query, key = query.turned_by_model(), key.turned_by_model()
    if not isinstance(query, Unturned):
        own = _own_function(name, module)
        return own(module, query, key, value, attention_mask, *args, **kwargs)
    if kwargs.get("dropout"):
        raise ValueError(
            "dropout: expected no dropout in attention under tiers by position, got "
            f"{kwargs['dropout']}"
        )
    options = Options(kwargs.get("scaling"), kwargs.get("sliding_window"), kwargs.get("softcap"))
    if query.rotation.plan is None and isinstance(key, Cached) and isinstance(key.start, int):
        from longrope.patching import tier_outside  # which imports the compiler

        out = tier_outside.attend(query, key, value, options, module.layer_idx)
    elif query.rotation.plan is None:
        out = tier_compiled.attend(query, key, value, attention_mask, options, module.layer_idx)
    else:
        rotary = module_of(query.rotation.ticket)
        out = attend(query, key, value, rotary, options, module.layer_idx)
    return out.transpose(1, 2), None


def _own_function(name: str, module: nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """Return the function that a layer runs without us."""
    file = file_of(module)
    if name == "eager":
        return file.eager_attention_forward
    return file.ALL_ATTENTION_FUNCTIONS[name]


def _tiered_mask(name: str, *args: Any, **kwargs: Any) -> Any:
    """Return the mask that the model's own implementation asks for."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    if name not in ALL_MASK_ATTENTION_FUNCTIONS:
        return None
    return ALL_MASK_ATTENTION_FUNCTIONS[name](*args, **kwargs)


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
