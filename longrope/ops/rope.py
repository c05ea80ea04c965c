"""Rotary position embedding with rescaled frequencies, to 1e-6 rad up to position 2^42.

The angle of position `n` in pair `i` is `n * inv_freq[i]`, reduced to one turn in 64-bit fixed
point: off by at most `pi 2^-64 |n|`, which is 4e-13 rad at position 2^21 (float32 products: 0.16),
8e-7 at 2^42 and 0.2 at 2^60. For the fastest pairs the rounding of `inv_freq` to float64 alone is
hundreds of times more. See `csrc/rope/rope.h` for the kernels and `longrope.ops.reference.rope` for
the specification in plain PyTorch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longrope import _native  # noqa: F401  (registers torch.ops.longrope)
from longrope.ops._arguments import (
    argument_names,
    check_tensors,
    expect,
    factor_sets,
    is_int64,
)
from longrope.ops._autograd import keep_arguments, kept_arguments, stride_1
from longrope.ops._fake import rope as _fakes  # noqa: F401  (registers them)
from longrope.ops._forward_mode import linear_in, refuse_tangents, tangents

__all__ = ["rerotate", "rerotate_rows_", "rope", "rope_"]


def rope(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """Turn queries and keys by their positions (LongRoPE, equation 1); the inputs stay unchanged.

    In plain torch, with `phase = positions[:, None] * inv_freq` and the halves `x1, x2` of a row:
    `cos, sin = attention_factor * phase.cos(), attention_factor * phase.sin()`, and
    `torch.cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin], -1)`.

    Parameters
    ----------
    q : float32, bfloat16, float16 (CPU also float64) `[B, H, N, D]`
        Queries, any strides with stride 1 in `D`.
    k : the dtype of q, `[B, Hk, N, D]`
        Keys, likewise.
    positions : int64 `[N]` or `[B, N]`
        May be negative. Angles are off by at most `pi 2^-64 |position|` rad: 1e-6 up to 2^42.
    inv_freq : float64 `[R/2]`, `[B, R/2]` or `[B or 1, G, R/2]`
        Radians per token, `R <= D`; dimensions from `R` on are copied. With `G`, the heads of q and
        of k each part evenly into `G` neighbourhoods; `G = Hk`: query heads turn as their key head.
    start_tokens : int or int64 `[B]`
        Positions below it turn by `base_inv_freq` (n_hat of the paper); 0: none do, not even
        negative ones.
    base_inv_freq : float64 `[R/2]` or `[B, R/2]`, optional
        The original frequencies; required with `start_tokens`.
    attention_factor : float or tensor `[]` or `[B]`, with groups also `[B or 1, G]`
        Multiplies the rotated dimensions (sections 3 of YaRN and Phi-3's `su`).
    interleaved : bool
        Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.

    Returns
    -------
    q, k : fresh tensors
        In the memory order of the inputs (`[B, N, H, D]` or `[B, H, N, D]`). Differentiable in q,
        k, inv_freq, base_inv_freq and attention_factor, twice in q and k. Forward-mode tangents
        (`torch.func.jvp`) of q and k turn with them.

    Raises
    ------
    ValueError
        Where a shape, dtype, device or stride is not as above, a frequency or factor is not finite
        (CPU), or `base_inv_freq` is missing.
    NotImplementedError
        Where the frequencies or the factor have forward-mode tangents.
    """
    _check(q, k, positions, inv_freq, start_tokens, base_inv_freq, attention_factor, interleaved)
    refuse_tangents(
        "rope", inv_freq=inv_freq, base_inv_freq=base_inv_freq, attention_factor=attention_factor
    )
    turned_by = (
        positions, inv_freq, base_inv_freq, *start_and_factor(start_tokens, attention_factor),
        interleaved, False,
    )  # fmt: skip
    return linear_in(lambda q, k: torch.ops.longrope.rope(q, k, *turned_by), q, k)


def rope_(
    q: Tensor,
    k: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> tuple[Tensor, Tensor]:
    """As `rope`, in place: writes to q and k and returns them. For caches and inference.

    Raises
    ------
    ValueError
        As `rope`; also where q or k overlap each other or themselves (an expanded tensor), or where
        a gradient is asked for.
    """
    _check(q, k, positions, inv_freq, start_tokens, base_inv_freq, attention_factor, interleaved)
    _refuse_gradients("rope_", "rope", q, k, inv_freq, base_inv_freq, attention_factor)
    torch.ops.longrope.rope_(
        q, k, positions, inv_freq, base_inv_freq,
        *start_and_factor(start_tokens, attention_factor), interleaved,
    )  # fmt: skip
    return q, k


def rerotate(
    k: Tensor,
    positions: Tensor,
    from_factors: Any,
    to_factors: Any,
    interleaved: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Turn keys that were rotated under one factor set into keys rotated under another.

    Each key turns once, by the difference of its two phases (exact in fixed point), and is scaled
    by the ratio of the attention factors. Dimensions beyond `rotary_dim` are copied.

    Parameters
    ----------
    k : float32, bfloat16, float16 (CPU also float64) `[B, Hk, N, D]`
        Rotated keys, any strides with stride 1 in `D`.
    positions : int64 `[N]` or `[B, N]`
        The positions that they were rotated at.
    from_factors, to_factors : longrope.RescaleFactors
        The set that turned them, and the set wanted; of one `rotary_dim`. Positions below a set's
        `start_tokens` have its original frequencies. Sets with factors for each head are those of
        one layer (`RescaleFactors.layer`).
    interleaved : bool
        Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.
    out : tensor like k, optional
        Written and returned; `out=k` turns them in place.

    Returns
    -------
    Tensor
        `out`, or a fresh tensor that is differentiable in k, in forward mode too.

    Raises
    ------
    ValueError
        Where a shape, dtype, device or stride is not as above, the sets do not fit, or `out`
        overlaps k without being k.
    """
    check_tensors(k=k, positions=positions, **({} if out is None else {"out": out}))
    expect(isinstance(interleaved, bool), "interleaved", "a bool", interleaved)
    sets = factor_sets(from_factors, to_factors, k.device)
    if out is None:
        turned_by = (positions, *sets, interleaved)
        return linear_in(lambda k: (torch.ops.longrope.rerotate(k, *turned_by),), k)[0]
    _refuse_gradients("rerotate(out=...)", "rerotate without out", k, out)
    if out is k:
        torch.ops.longrope.rerotate_(k, positions, *sets, interleaved)
    else:
        torch.ops.longrope.rerotate_out(k, positions, *sets, interleaved, out)
    return out


def rerotate_rows_(
    k: Tensor,
    positions: Tensor,
    from_tier: Tensor,
    to_tier: Tensor,
    inv_freq: Tensor,
    start_tokens: int | Tensor = 0,
    base_inv_freq: Tensor | None = None,
    attention_factor: float | Tensor = 1.0,
    interleaved: bool = False,
) -> Tensor:
    """Turn the keys of every row from one tier of frequencies to another, in place.

    For caches whose rows enter their next tier one by one: where `from_tier` and `to_tier` agree a
    row stays as it is, bit for bit and at no cost. The others turn once, by the difference of their
    two phases (exact in fixed point), and are scaled by the ratio of the attention factors. Nothing
    waits for a CUDA device.

    Parameters
    ----------
    k : float32, bfloat16, float16 (CPU also float64) `[B, Hk, N, D]`
        Keys, any strides with stride 1 in `D`; written.
    positions : int64 `[N]` or `[B, N]`
        The positions that they are rotated at; may be negative.
    from_tier, to_tier : int64 `[B]`
        The tier that turned a row's keys, and the tier wanted; -1: not rotated.
    inv_freq : float64 `[T, R/2]`, `[B, T, R/2]` or `[B or 1, G, T, R/2]`
        Radians per token of each tier, `R <= D`; dimensions from `R` on stay. `G` as for `rope`.
    start_tokens : int or int64 `[T]` or `[B, T]`
        Positions below it turn by `base_inv_freq`; 0: none do.
    base_inv_freq : float64 `[R/2]` or `[B, R/2]`, optional
        The original frequencies; required with `start_tokens`.
    attention_factor : float or tensor `[]`, `[T]` or `[B, T]`, with groups also `[B or 1, G, T]`
        What each tier multiplies the rotated dimensions by; not 0.
    interleaved : bool
        Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.

    Returns
    -------
    Tensor
        k.

    Raises
    ------
    ValueError
        Where a shape, dtype, device or stride is not as above, `base_inv_freq` is missing, k
        overlaps itself (an expanded tensor) or a gradient is asked for; on CPU also where a number
        is not finite or a tier is out of range (on CUDA such a row becomes NaN).
    """
    _check(k, k, positions, inv_freq, start_tokens, base_inv_freq, attention_factor, interleaved)
    check_tensors(k=k, from_tier=from_tier, to_tier=to_tier)
    _refuse_gradients("rerotate_rows_", "rerotate", k, inv_freq, base_inv_freq, attention_factor)
    start_tokens, starts, attention_factor, factors = start_and_factor(
        start_tokens, attention_factor
    )
    if factors is not None and factors.dim() == 0:
        factors = factors.expand(inv_freq.shape[-2])
    torch.ops.longrope.rerotate_rows_(
        k, positions, from_tier, to_tier, inv_freq, base_inv_freq, start_tokens, starts,
        attention_factor, factors, interleaved,
    )  # fmt: skip
    return k


def _check(q, k, positions, inv_freq, start_tokens, base, factor, interleaved) -> None:
    """Check types and devices, which the dispatcher refuses in longer words or not at all.

    Shapes and values are the kernels' to check.
    """
    tensors = {"q": q, "k": k, "positions": positions, "inv_freq": inv_freq}
    if isinstance(start_tokens, Tensor):
        tensors["start_tokens"] = start_tokens
    else:
        expect(is_int64(start_tokens), "start_tokens", "an int or int64 [B]", start_tokens)
    if base is not None:
        tensors["base_inv_freq"] = base
    if isinstance(factor, Tensor):
        tensors["attention_factor"] = factor
    else:
        expect(isinstance(factor, (int, float)), "attention_factor", "a number", factor)
    check_tensors(**tensors)
    expect(isinstance(interleaved, bool), "interleaved", "a bool", interleaved)


def start_and_factor(
    start_tokens: int | Tensor, attention_factor: float | Tensor
) -> tuple[int, Tensor | None, float, Tensor | None]:
    """Split each argument into the scalar and the tensor that the op takes."""
    rows = factor = None
    if isinstance(start_tokens, Tensor):
        start_tokens, rows = 0, start_tokens
    if isinstance(attention_factor, Tensor):
        attention_factor, factor = 1.0, attention_factor.to(torch.float64)
    return start_tokens, rows, attention_factor, factor


def _refuse_gradients(name: str, instead: str, *arguments: object) -> None:
    if torch.is_grad_enabled() and any(
        isinstance(a, Tensor) and a.requires_grad for a in arguments
    ):
        raise ValueError(
            f"{name}: writes in place and has no gradient, got an argument that requires one; "
            f"use {instead}, or torch.no_grad()"
        )
    if tangents(*arguments):
        raise NotImplementedError(
            f"{name}: expected no forward-mode tangents (torch.func.jvp, jacfwd), got an argument "
            f"that has one; use {instead}, which writes to fresh memory"
        )


_ARGUMENTS = argument_names("rope")
# Which of them have a gradient, beside q and k.
_INV_FREQ, _BASE_INV_FREQ, _FACTOR = map(
    _ARGUMENTS.index, ("inv_freq", "base_inv_freq", "attention_factor_rows")
)


def _rope_setup(ctx, inputs, output):
    q, k, positions, inv_freq, base, start_tokens, rows, factor, factor_rows, *flags = inputs
    ctx.scalars = start_tokens, factor, *flags
    needs = ctx.needs_input_grad
    ctx.needs_angles = needs[_INV_FREQ] or needs[_BASE_INV_FREQ] or needs[_FACTOR]
    kept = (q, k) if ctx.needs_angles else (None, None)
    ctx.save_for_backward(*kept, positions, inv_freq, base, rows, factor_rows)


def _rope_backward(ctx, grad_q, grad_k):
    q, k, positions, inv_freq, base, rows, factor_rows = ctx.saved_tensors
    start_tokens, factor, interleaved, inverse = ctx.scalars
    grad_q, grad_k = stride_1(grad_q), stride_1(grad_k)
    turned_by = (
        positions, inv_freq, base, start_tokens, rows, factor, factor_rows, interleaved
    )  # fmt: skip
    grads = [None] * len(_ARGUMENTS)
    # The gradient of a rotation is the rotation back.
    grads[0], grads[1] = torch.ops.longrope.rope(grad_q, grad_k, *turned_by, not inverse)
    if ctx.needs_angles:
        to_inv_freq, to_base, to_factor = torch.ops.longrope.rope_backward(
            grad_q, grad_k, q, k, *turned_by, inverse
        )
        if ctx.needs_input_grad[_INV_FREQ]:
            grads[_INV_FREQ] = to_inv_freq.sum_to_size(inv_freq.shape)
        if ctx.needs_input_grad[_BASE_INV_FREQ]:
            grads[_BASE_INV_FREQ] = to_base.sum_to_size(base.shape)
        if ctx.needs_input_grad[_FACTOR]:
            if to_factor.dim() > 1 and factor_rows.dim() < 2:
                to_factor = to_factor.sum(1)  # one for all groups of heads
            grads[_FACTOR] = to_factor.sum_to_size(factor_rows.shape)
    return tuple(grads)


torch.library.register_autograd("longrope::rope", _rope_backward, setup_context=_rope_setup)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("rope: no second derivative for inv_freq and attention_factor")


torch.library.register_autograd("longrope::rope_backward", _no_second_derivative)


_REROTATE_ARGUMENTS = argument_names("rerotate")


def _other_set(name: str) -> str:
    """Return the argument of rerotate that says of the other factor set what `name` says of one."""
    for one, other in (("from_", "to_"), ("to_", "from_")):
        if name.startswith(one):
            return other + name.removeprefix(one)
    return name


def _rerotate_setup(ctx, inputs, output):
    keep_arguments(ctx, _REROTATE_ARGUMENTS[1:], inputs[1:])  # not k


def _rerotate_backward(ctx, grad):
    arguments, _ = kept_arguments(ctx)
    turned_back = {_other_set(name): a for name, a in arguments.items()}
    return torch.ops.longrope.rerotate(stride_1(grad), **turned_back), *[None] * len(arguments)


torch.library.register_autograd(
    "longrope::rerotate", _rerotate_backward, setup_context=_rerotate_setup
)
