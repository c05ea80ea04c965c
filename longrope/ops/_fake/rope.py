"""The fake kernels of rope and its relatives."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from longrope import _native  # noqa: F401  (registers torch.ops.longrope)
from longrope.ops._arguments import check_frequencies, check_positions, describe, expect
from longrope.ops._fake.checks import check_device, check_dtype, check_rows, check_stride, fresh

__all__ = ["check_turn"]


def _check_rope_heads(name: str, t: Tensor, q: Tensor) -> None:
    """Check `[B, heads, N, D]` of the dtype, B, N and D of q."""
    expect(t.dim() == 4, name, "[B, heads, N, D]", t)
    check_device(name, t, q)
    like = f"the dtype, B, N and D of {describe(q)}"
    expect(
        t.dtype == q.dtype and t.shape[0] == q.shape[0] and t.shape[2:] == q.shape[2:],
        name, like, t,
    )  # fmt: skip
    check_stride(name, t)


def _check_rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    base_inv_freq: Tensor | None,
    start_tokens: int,
    start_tokens_rows: Tensor | None = None,
    attention_factor: float = 1.0,
    attention_factor_rows: Tensor | None = None,
    *_flags: bool,
    names: tuple[str, str] = ("q", "k"),
) -> None:
    """Check what `longrope::rope` takes; its relatives call q and k by other names."""
    _check_rope_heads(names[0], q, q)
    _check_rope_heads(names[1], k, q)
    check_dtype(names[0], q)
    check_turn(
        q, positions, inv_freq, base_inv_freq, start_tokens, start_tokens_rows, attention_factor,
        attention_factor_rows, heads=(q.shape[1], k.shape[1]),
    )  # fmt: skip


def _check_tiers(
    k: Tensor,
    positions: Tensor,
    from_tier: Tensor,
    to_tier: Tensor,
    *turned_by: object,
) -> None:
    """Check what `longrope::rerotate_rows_` takes."""
    _check_rope_heads("k", k, k)
    check_dtype("k", k)
    check_turn(k, positions, *turned_by[:-1], in_tiers=True, heads=(k.shape[1],) * 2)
    for name, tier in (("from_tier", from_tier), ("to_tier", to_tier)):
        check_rows(name, tier, k, f"int64 [{k.shape[0]}]")


def _check_in_place(name: str, t: Tensor) -> None:
    """Check that no two indices are one element; addresses of two tensors a fake does not know."""
    if any(isinstance(n, torch.SymInt) for n in (*t.shape, *t.stride())) or not t.numel():
        return
    extent, dims = 1, sorted(zip(t.stride(), t.shape, strict=True))
    for stride, size in dims:
        if size > 1 and stride < extent:
            raise ValueError(
                f"{name}: expected memory without overlap to write to, got strides "
                f"{list(t.stride())} for {describe(t)}"
            )
        extent += (size - 1) * stride


def check_turn(
    q: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    base: Tensor | None,
    start_tokens: int,
    start_rows: Tensor | None,
    factor: float,
    factor_rows: Tensor | None,
    in_tiers: bool = False,
    position_name: str = "positions",
    heads: tuple[int, ...] | None = None,
) -> None:
    """Check what turns `[B, heads, N, D]`; with `heads` by groups of them too."""
    batch, _, tokens, head_dim = q.shape
    check_positions(position_name, positions, batch, tokens)
    tiers = None
    if in_tiers:
        tiers = inv_freq.shape[-2] if inv_freq.dim() > 1 else 0
    expect(start_tokens >= 0, "start_tokens", "0 or more", start_tokens)
    expect(math.isfinite(factor), "attention_factor", "a finite number", factor)
    expect(tiers is None or tiers > 0, "inv_freq", "at least one tier", inv_freq)
    pairs = inv_freq.shape[-1] if inv_freq.dim() else 0
    if 2 * pairs > head_dim:
        raise ValueError(
            f"inv_freq: expected 1 to {head_dim // 2} frequencies for head_dim {head_dim}, got "
            f"{pairs}"
        )
    check_frequencies(
        inv_freq, start_tokens if start_rows is None else start_rows, base,
        factor if factor_rows is None else factor_rows, batch, tiers, heads,
    )  # fmt: skip
    if factor_rows is not None:
        expect(factor_rows.dtype == torch.float64, "attention_factor", "float64", factor_rows)
    for name, t in (
        (position_name, positions), ("inv_freq", inv_freq), ("base_inv_freq", base),
        ("start_tokens", start_rows), ("attention_factor", factor_rows),
    ):  # fmt: skip
        check_device(name, t, q)


@torch.library.register_fake("longrope::rope")
def _(q, k, *turned_by):
    _check_rope(q, k, *turned_by)
    return fresh(q), fresh(k)


@torch.library.register_fake("longrope::rope_")
def _(q, k, *turned_by):
    _check_rope(q, k, *turned_by)
    _check_in_place("q", q)
    _check_in_place("k", k)


@torch.library.register_fake("longrope::rope_backward")
def _(grad_q, grad_k, q, k, positions, inv_freq, *turned_by):
    _check_rope(q, k, positions, inv_freq, *turned_by)
    for name, grad, x in (("grad_q", grad_q, q), ("grad_k", grad_k, k)):
        _check_rope_heads(name, grad, x)
        expect(grad.shape[1] == x.shape[1], name, f"the shape of {describe(x)}", grad)
    groups = inv_freq.shape[1:2] if inv_freq.dim() == 3 else ()
    rows = inv_freq.new_empty(q.shape[0], *groups, inv_freq.shape[-1])
    base = inv_freq.new_empty(q.shape[0], inv_freq.shape[-1])
    return rows, base, inv_freq.new_empty(q.shape[0], *groups)


@contextlib.contextmanager
def _prefixed(prefix: str) -> Iterator[None]:
    """Call frequencies that are refused inside by the name that they have in `rerotate`."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(("inv_freq", "base_inv_freq")):
            raise ValueError(prefix + str(error)) from None
        raise


def _check_rerotate(k, positions, *sets, out=None):
    inv_freq, base, start, other, other_base, other_start, factor, by_group, _ = sets
    out, names = (k, ("k", "k")) if out is None else (out, ("k", "out"))
    with _prefixed("from_"):
        _check_rope(k, out, positions, inv_freq, base, start, None, factor, names=names)
    pairs = inv_freq.shape[-1]
    expect(other.dim() > 0 and other.shape[-1] == pairs, "to_inv_freq", f"float64 [{pairs}]", other)
    with _prefixed("to_"):
        _check_rope(k, out, positions, other, other_base, other_start, names=names)
    grouped = [t for t in (inv_freq, other) if t.dim() == 3]
    if len(grouped) == 2 and other.shape[1] != inv_freq.shape[1]:
        expect(False, "to_inv_freq", f"{inv_freq.shape[1]} groups of heads", other)
    if by_group is not None:
        some = grouped[0] if grouped else inv_freq
        _check_rope(k, out, positions, some, None, 0, None, factor, by_group, names=names)
    expect(out.shape[1] == k.shape[1], "out", f"the shape of {describe(k)}", out)


@torch.library.register_fake("longrope::rerotate")
def _(k, *turned_by):
    _check_rerotate(k, *turned_by)
    return fresh(k)


@torch.library.register_fake("longrope::rerotate_out")
def _(k, *arguments):
    *turned_by, out = arguments
    _check_rerotate(k, *turned_by, out=out)
    _check_in_place("out", out)


@torch.library.register_fake("longrope::rerotate_")
def _(k, *turned_by):
    _check_rerotate(k, *turned_by)
    _check_in_place("out", k)


@torch.library.register_fake("longrope::rerotate_rows_")
def _(k, *arguments):
    _check_tiers(k, *arguments)
    _check_in_place("k", k)
