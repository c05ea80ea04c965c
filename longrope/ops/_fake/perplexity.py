"""The fake kernels of linear_nll and candidate_sums."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longrope import _native  # noqa: F401  (registers torch.ops.longrope)
from longrope.ops._arguments import describe, expect
from longrope.ops._fake.checks import check_dtype, check_sizes, dtype_name, wide_dtype


def _check_on(name: str, t: Tensor, dtype: torch.dtype, sizes: Sequence, like: Tensor) -> None:
    text = f"{dtype_name(dtype)} {list(sizes)} on {like.device}"
    if t.dtype != dtype or t.device != like.device:
        raise ValueError(f"{name}: expected {text}, got {describe(t)} on {t.device}")
    check_sizes(name, t, sizes, text)


def _check_nll(
    hidden: Tensor, weight: Tensor, targets: Tensor, softcap: float | None, **by_row: Tensor
) -> None:
    """Check what `longrope::linear_nll` takes; `by_row` are `[T]` or `[2, T]` of the wide dtype."""
    expect(hidden.dim() == 2, "hidden", f"[T, E] on {hidden.device}", hidden)
    check_dtype("hidden", hidden)
    text = (
        f"[V, E] of hidden's E, dtype and device, hidden is {describe(hidden)} on {hidden.device}"
    )
    expect(
        weight.dim() == 2 and weight.dtype == hidden.dtype and weight.device == hidden.device,
        "weight", text, weight,
    )  # fmt: skip
    check_sizes("weight", weight, (weight.shape[0], hidden.shape[1]), text)
    rows = hidden.shape[0]
    _check_on("targets", targets, torch.int64, (rows,), hidden)
    expect(
        softcap is None or 0 < softcap < math.inf, "softcap", "None or a positive number", softcap
    )
    for name, t in by_row.items():
        _check_on(name, t, wide_dtype(hidden), (2, rows) if name == "stats" else (rows,), hidden)


def _check_candidate_sums(nll: Tensor, targets: Tensor, candidate: Tensor, candidates: int) -> None:
    """Check what `longrope::candidate_sums` takes."""
    expect(nll.dim() == 1, "nll", f"[T] on {nll.device}", nll)
    check_dtype("nll", nll)
    expect(nll.dtype in (torch.float32, torch.float64), "nll", "float32 or float64", nll)
    for name, t in (("targets", targets), ("candidate", candidate)):
        _check_on(name, t, torch.int64, nll.shape, nll)
    expect(candidates >= 0, "candidates", "a count", candidates)


def _wide(hidden: Tensor, *shape: int) -> Tensor:
    return hidden.new_empty(shape, dtype=wide_dtype(hidden))


@torch.library.register_fake("longrope::linear_nll")
def _(hidden, weight, targets, ignore_index=-100, softcap=None):
    _check_nll(hidden, weight, targets, softcap)
    return _wide(hidden, hidden.shape[0]), _wide(hidden, 2, hidden.shape[0])


@torch.library.register_fake("longrope::linear_nll_backward")
def _(
    grad_nll, hidden, weight, targets, stats, ignore_index, softcap, need_hidden, need_weight
):  # fmt: skip
    _check_nll(hidden, weight, targets, softcap, grad_nll=grad_nll, stats=stats)
    grad_hidden = hidden.new_empty(hidden.shape if need_hidden else (0,))
    return grad_hidden, weight.new_empty(weight.shape if need_weight else (0,))


@torch.library.register_fake("longrope::linear_nll_with_gradient")
def _(hidden, weight, targets, edge, ignore_index=-100, softcap=None):
    _check_nll(hidden, weight, targets, softcap)
    return _wide(hidden, hidden.shape[0]), hidden.new_empty(hidden.shape)


@torch.library.register_fake("longrope::linear_nll_scale")
def _(grad_nll, gradient, targets, edge, ignore_index):
    expect(gradient.dim() == 2, "gradient", f"[T, E] on {gradient.device}", gradient)
    check_dtype("gradient", gradient)
    _check_on("grad_nll", grad_nll, wide_dtype(gradient), gradient.shape[:1], gradient)
    _check_on("targets", targets, torch.int64, gradient.shape[:1], gradient)
    return gradient.new_empty(gradient.shape)


@torch.library.register_fake("longrope::candidate_sums")
def _(nll, targets, candidate, candidates, ignore_index=-100):
    _check_candidate_sums(nll, targets, candidate, candidates)
    return nll.new_empty(candidates, dtype=torch.float64), targets.new_empty(candidates)
