"""The fake kernels of attention and merge_attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrope._native import _C
from longrope.ops._arguments import argument_names, expect
from longrope.ops._fake.checks import (
    check_device,
    check_dtype,
    check_rows,
    check_stride,
    dtype_name,
    fresh,
    wide_dtype,
)
from longrope.ops._fake.rope import check_turn

_OPTIONS = len(argument_names("attention")) - 3  # all but q, k and v


def _check_heads(
    name: str, t: Tensor, like: Tensor, sizes: tuple[int | None, ...] = (None,) * 4
) -> None:
    check_device(name, t, like)
    shown = (
        open_ if size is None else str(size)
        for size, open_ in zip(sizes, ("B", "heads", "tokens", "D"), strict=True)
    )
    fits = t.dim() == 4 and all(
        size is None or size == got for size, got in zip(sizes, t.shape, strict=True)
    )
    expect(
        fits and t.dtype == like.dtype, name, f"{dtype_name(like.dtype)} [{', '.join(shown)}]", t
    )
    check_stride(name, t)


def _check_lse(name: str, t: Tensor, out: Tensor) -> None:
    """Check a log-sum-exp of what `out` holds."""
    check_device(name, t, out)
    wide = wide_dtype(out)
    expect(
        t.dtype == wide and t.shape == out.shape[:3],
        name, f"{dtype_name(wide)} {list(out.shape[:3])}", t,
    )  # fmt: skip


def _check_attention(q: Tensor, k: Tensor, v: Tensor, causal: bool, *options: object) -> None:
    """Check what `longrope::attention` takes."""
    *bounds, window, scale, softcap = options
    _check_heads("q", q, q)
    check_dtype("q", q)
    batch, heads, _, head_dim = q.shape
    if not 1 <= head_dim <= _C.MAX_HEAD_DIM:
        raise ValueError(f"q: expected head_dim 1 to {_C.MAX_HEAD_DIM}, got {head_dim}")
    _check_heads("k", k, q, (batch, None, None, head_dim))
    kv_heads, keys = k.shape[1:3]
    if not (heads % kv_heads == 0 if kv_heads else heads == 0):
        raise ValueError(
            f"k: expected a number of heads that divides the {heads} heads of q, got {kv_heads}"
        )
    _check_heads("v", v, q, (batch, kv_heads, keys, head_dim))
    names = ("query_start", "key_start", "key_length", "query_range", "query_range")
    for name, value, rows in zip(names, bounds[::2], bounds[1::2], strict=True):
        if rows is not None:
            check_rows(name, rows, q, f"an int or int64 [{batch}]")
        elif name.startswith("key"):
            expect(0 <= value <= keys, name, f"0 to {keys} (the keys)", value)
    expect(window >= 0, "window", "1 or more, or none", window)
    expect(math.isfinite(scale), "scale", "a finite number", scale)
    expect(0 <= softcap < math.inf, "softcap", "a positive number, or none", softcap)


def _check_rotation(
    q: Tensor,
    k: Tensor,
    query_positions: Tensor,
    key_positions: Tensor,
    limits: Tensor | None,
    *turned_by: object,
) -> None:
    """Check what `longrope::attention_rotated` takes beside what `longrope::attention` does."""
    inv_freq = turned_by[0]
    for x, name, positions in (
        (q, "query_positions", query_positions), (k, "key_positions", key_positions),
    ):  # fmt: skip
        check_turn(x, positions, *turned_by[:-1], in_tiers=True, position_name=name)
    tiers = inv_freq.shape[-2]
    if limits is None:
        expect(tiers == 1, "inv_freq", "one tier without limits", inv_freq)
        return
    expect(
        limits.dtype == torch.int64 and limits.shape == (tiers,), "limits", f"int64 [{tiers}]",
        limits,
    )  # fmt: skip
    check_device("limits", limits, q)


def _check_merge(out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor) -> None:
    """Check what `longrope::merge_attention` takes."""
    _check_heads("out_a", out_a, out_a)
    check_dtype("out_a", out_a)
    if out_a.shape[3] > _C.MAX_HEAD_DIM:
        raise ValueError(
            f"out_a: expected head_dim at most {_C.MAX_HEAD_DIM}, got {out_a.shape[3]}"
        )
    _check_heads("out_b", out_b, out_a, tuple(out_a.shape))
    _check_lse("lse_a", lse_a, out_a)
    _check_lse("lse_b", lse_b, out_a)


@torch.library.register_fake("longrope::attention")
def _(q, k, v, *options):
    _check_attention(q, k, v, *options)
    return fresh(q), _lse_of(q)


@torch.library.register_fake("longrope::attention_rotated")
def _(q, k, v, *arguments):
    options, turned_by = arguments[:_OPTIONS], arguments[_OPTIONS:]
    _check_attention(q, k, v, *options)
    _check_rotation(q, k, *turned_by)
    return fresh(q), _lse_of(q)


@torch.library.register_fake("longrope::attention_backward")
def _(grad_out, grad_lse, q, k, v, out, lse, *options):
    _check_attention(q, k, v, *options)
    _check_heads("out", out, q, tuple(q.shape))
    _check_heads("grad_out", grad_out, q, tuple(q.shape))
    for name, t in (("lse", lse), ("grad_lse", grad_lse)):
        if t is not None:
            _check_lse(name, t, q)
    return fresh(q), fresh(k), fresh(v)


@torch.library.register_fake("longrope::merge_attention")
def _(out_a, lse_a, out_b, lse_b):
    _check_merge(out_a, lse_a, out_b, lse_b)
    return fresh(out_a), lse_a.new_empty(lse_a.shape)


def _lse_of(q: Tensor) -> Tensor:
    return q.new_empty(q.shape[:3], dtype=wide_dtype(q))
