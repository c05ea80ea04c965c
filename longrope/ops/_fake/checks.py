"""What the fake kernels of all ops check and allocate alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longrope.ops._arguments import describe, expect

__all__ = [
    "check_device",
    "check_dtype",
    "check_rows",
    "check_sizes",
    "check_stride",
    "dtype_name",
    "fresh",
    "wide_dtype",
]

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def wide_dtype(t: Tensor) -> torch.dtype:
    """Return the dtype of sums over elements of `t`."""
    return torch.float64 if t.dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_dtype(name: str, t: Tensor) -> None:
    if t.device.type in ("cpu", "meta"):
        expected = "float32, bfloat16, float16 or float64"
        expect(t.dtype in (*_FLOATS, torch.float64), name, expected, t)
    else:
        expect(t.dtype in _FLOATS, name, f"float32, bfloat16 or float16 on {t.device}", t)


def check_device(name: str, t: Tensor | None, like: Tensor) -> None:
    if t is not None and t.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, got {t.device}")


def check_stride(name: str, t: Tensor) -> None:
    last_is_1 = t.shape[-1] <= 1 or t.stride(-1) == 1
    if not last_is_1 and t.numel() > 0:
        raise ValueError(f"{name}: expected stride 1 in the last dimension, got {list(t.stride())}")


def check_sizes(name: str, t: Tensor, sizes: Sequence, text: str) -> None:
    """Check sizes that may be symbols without a value yet: then they are checked when they have."""
    message = f"{name}: expected {text}, got {describe(t)}"
    torch._check_value(t.dim() == len(sizes), lambda: message)
    for got, wanted in zip(t.shape, sizes, strict=True):
        torch._check_value(got == wanted, lambda: message)


def check_rows(name: str, t: Tensor, q: Tensor, text: str) -> None:
    expect(t.dtype == torch.int64 and t.dim() == 1 and t.shape[0] == q.shape[0], name, text, t)
    check_device(name, t, q)


def fresh(like: Tensor) -> Tensor:
    """Return what the kernels allocate: the memory order of `like`, without gaps."""
    batch, heads, tokens, head_dim = like.shape
    if like.stride(1) < like.stride(2):
        return like.new_empty(batch, tokens, heads, head_dim).transpose(1, 2)
    return like.new_empty(batch, heads, tokens, head_dim)
