"""What the gradient formulas of the ops share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor


def keep_arguments(ctx: Any, names: Sequence[str], inputs: Sequence, *others: Tensor) -> None:
    """Keep the arguments of an op for its gradient, and other tensors."""
    arguments = dict(zip(names, inputs, strict=True))
    tensors = {name: a for name, a in arguments.items() if isinstance(a, Tensor)}
    ctx.save_for_backward(*tensors.values(), *others)
    ctx.arguments = arguments | dict.fromkeys(tensors)
    ctx.tensors = list(tensors)


def kept_arguments(ctx: Any) -> tuple[dict[str, Any], tuple[Tensor, ...]]:
    """Return what `keep_arguments` kept: the arguments by name, and the other tensors."""
    count = len(ctx.tensors)
    saved = ctx.saved_tensors  # once: activation checkpoints hand them out a single time
    tensors = dict(zip(ctx.tensors, saved[:count], strict=True))
    return ctx.arguments | tensors, saved[count:]


def stride_1(t: Tensor) -> Tensor:
    """Return t, or a copy where its last dimension has another stride than the kernels take."""
    return t if t.stride(-1) == 1 or t.shape[-1] <= 1 else t.contiguous()
