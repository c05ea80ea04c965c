"""Attention by a function of ours in the layers of a Hugging Face model, inside a block."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor, nn

from longrope import ops
from longrope.patching.models import decoder

#: What the function is called in transformers' `AttentionInterface`.
NAME = "longrope"
_ATTEND = "_longrope_attend"


@contextlib.contextmanager
def kernel_attention(
    model: nn.Module, attend: Callable[..., Tensor] | None = None
) -> Iterator[None]:
    """Inside the block the model's attention layers run `attend`, `ops.attention` unless given.

    attend
        Called as `attend(q, k, v, causal=, window=, scale=, softcap=)` with rotated q
        `[B, H, N, D]` and k, v `[B, Hk, M, D]`; returns `[B, H, N, D]`.
    """
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _forward)
    base = decoder(model)
    layers = [layer.self_attn for layer in base.layers]
    before = base.config._attn_implementation
    base.config._attn_implementation = NAME
    for layer in layers:
        layer.__dict__[_ATTEND] = attend or ops.attention
    try:
        yield
    finally:
        base.config._attn_implementation = before
        for layer in layers:
            layer.__dict__.pop(_ATTEND, None)


def _forward(
    module, query, key, value, attention_mask, scaling=None, sliding_window=None, softcap=None,
    is_causal=None, **_,
):  # fmt: skip
    attend = module.__dict__[_ATTEND]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(
        query, key, value, causal=causal, window=sliding_window, scale=scaling, softcap=softcap
    )
    return out.transpose(1, 2), None
