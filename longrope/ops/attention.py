"""Attention of a chunk of queries over a longer cache, and exact merging of partial results.

Nothing of size `[N, M]` is ever stored. See `csrc/attention/attention.h` for the kernels and
`longrope.ops.reference.attention` for the specification in plain PyTorch.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrope import _native  # noqa: F401  (registers torch.ops.longrope)
from longrope.ops import _rotated_attention
from longrope.ops._arguments import (
    argument_names,
    as_autocast,
    check_positions,
    check_tensors,
    expect,
    is_int64,
)
from longrope.ops._autograd import keep_arguments, kept_arguments, stride_1
from longrope.ops._fake import attention as _fakes  # noqa: F401  (registers them)
from longrope.ops._forward_mode import push_forward, refuse_tangents
from longrope.ops._groups import attend_groups
from longrope.ops._rotation import Rotation
from longrope.ops.rope import start_and_factor

__all__ = ["attention", "merge_attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool = True,
    query_start: int | Tensor | None = None,
    key_length: int | Tensor | None = None,
    key_start: int | Tensor | None = None,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotation: Rotation | None = None,
    return_lse: bool = False,
    query_range: tuple[int | Tensor, int | Tensor] | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attend queries to the keys that each of them sees; memory `O(N + M)`.

    Query `i` stands at position `query_start + i`, counted from the first key, and sees key `j`
    when `key_start <= j < key_length`, with `causal` only `j <= query_start + i`, and with a
    `window` only `j > query_start + i - window`. With a `query_range` (begin, end) queries outside
    `begin <= i < end` see no key. In plain torch, with the mask of those pairs:
    `scores = (scale * q @ k.mT).masked_fill(~mask, -inf)`, `out = scores.softmax(-1) @ v`,
    `lse = scores.logsumexp(-1)`. Keys and values that no query sees may hold anything, NaN too.
    Under `torch.autocast` q, k and v are taken in its dtype, as by `scaled_dot_product_attention`.

    Parameters
    ----------
    q : float32, bfloat16, float16 (CPU also float64) `[B, H, N, D]`
        Queries, `D <= 256`, any strides with stride 1 in `D`.
    k, v : the dtype of q, `[B, Hk, M, D]`
        Keys and values, likewise; `Hk` divides `H`, and head `h` attends head `h // (H / Hk)`.
    causal : bool
        Whether a query sees no key after its own position.
    query_start : int or int64 `[B]`, optional
        Position of the first query, `M - N` (the queries are the last) unless given; may be
        negative or beyond `M`.
    key_length, key_start : int or int64 `[B]`, optional
        Keys from `key_start` (0) to before `key_length` (`M`) exist: ragged rows, padding on either
        side, static caches.
    window : int, optional
        Sliding window, at least 1: a query sees itself and `window - 1` positions before it.
    scale : float, optional
        Multiplies the scores, `1 / sqrt(D)` unless given.
    softcap : float, optional
        Scores become `softcap * tanh(score / softcap)` (Gemma 2).
    rotation : Rotation, optional
        q and k come un-rotated and are turned inside, as by `ops.rope`: with `limits` each query,
        and its keys, by the tier that its position is in.
    return_lse : bool
        Return also the log-sum-exp of the scores.
    query_range : (int or int64 `[B]`, int or int64 `[B]`), optional
        The first query that attends, and the first behind the last that does; any values. Blocks of
        other queries do no work.

    Returns
    -------
    out : the dtype of q, `[B, H, N, D]`
        Fresh, in the memory order of q. A query that sees no key gives 0. Accumulated in float32
        (float64 for float64); the same on every run and for any number of threads. Differentiable
        in q, k and v, and in the rotation's inv_freq, base_inv_freq and attention_factor.
    lse : float32 (float64 for float64) `[B, H, N]`
        With `return_lse`: natural logarithm, -inf for a query that sees no key; differentiable.

    Raises
    ------
    ValueError
        Where a shape, dtype, device, stride or range is not as above; on CPU also where the limits
        do not grow or the tiers of a row's queries fall.
    NotImplementedError
        Where an argument has a forward-mode tangent (`torch.func.jvp`), or a second derivative is
        asked for.
    """
    check_tensors(q=q, k=k, v=v)
    refuse_tangents("attention", q=q, k=k, v=v)
    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    expect(isinstance(causal, bool), "causal", "a bool", causal)
    keys = k.shape[2] if k.dim() == 4 else 0
    queries = q.shape[2] if q.dim() == 4 else 0
    if window is not None:
        expect(is_int64(window) and window >= 1, "window", "an int of 1 or more, or None", window)
    if softcap is not None:
        expect(
            isinstance(softcap, (int, float)) and softcap > 0, "softcap",
            "a positive number, or None", softcap,
        )  # fmt: skip
    if scale is not None:
        expect(isinstance(scale, (int, float)), "scale", "a finite number, or None", scale)
    else:
        scale = 1 / math.sqrt(q.shape[-1]) if q.dim() == 4 and q.shape[-1] else 1.0
    expect(
        query_range is None or (isinstance(query_range, tuple) and len(query_range) == 2),
        "query_range", "a tuple of two, each an int or int64 [B], or None", query_range,
    )  # fmt: skip
    query_begin, query_end = query_range or (None, None)
    options = (
        causal,
        *_bound("query_start", query_start, keys - queries),
        *_bound("key_start", key_start, 0),
        *_bound("key_length", key_length, keys),
        *_bound("query_range", query_begin, 0),
        *_bound("query_range", query_end, queries),
        0 if window is None else window, scale, 0.0 if softcap is None else softcap,
    )  # fmt: skip
    if rotation is None:
        out, lse = torch.ops.longrope.attention(q, k, v, *options)
    else:
        expect(isinstance(rotation, Rotation), "rotation", "an ops.Rotation, or None", rotation)
        if rotation.groups is not None:
            out, lse = attend_groups(
                attention, q, k, v, rotation, query_range, causal=causal, query_start=query_start,
                key_length=key_length, key_start=key_start, window=window, scale=scale,
                softcap=softcap,
            )  # fmt: skip
            return (out, lse) if return_lse else out
        check_positions("query_positions", rotation.query_positions, q.shape[0], queries)
        check_positions("key_positions", rotation.key_positions, k.shape[0], keys)
        check_tensors(q=q, **rotation.tensors())
        refuse_tangents("attention", **rotation.tensors())
        inv_freq, start_tokens, attention_factor = rotation.by_tier()
        out, lse = torch.ops.longrope.attention_rotated(
            q, k, v, *options, rotation.query_positions, rotation.key_positions, rotation.limits,
            inv_freq, rotation.base_inv_freq,
            *start_and_factor(start_tokens, attention_factor), rotation.interleaved,
        )  # fmt: skip
    return (out, lse) if return_lse else out


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """Merge attention over two disjoint sets of keys into attention over their union, exactly.

    In plain torch: `lse = torch.logaddexp(lse_a, lse_b)` and
    `out = (lse_a - lse).exp()[..., None] * out_a + (lse_b - lse).exp()[..., None] * out_b`.

    Parameters
    ----------
    out_a, out_b : float32, bfloat16, float16 (CPU also float64) `[B, H, N, D]`
        What `attention` returned for each set, any strides with stride 1 in `D`.
    lse_a, lse_b : float32 (float64 for float64) `[B, H, N]`
        Its log-sum-exp. A side with -inf has no part in `out`, whatever it holds.

    Returns
    -------
    out, lse : as the inputs
        Fresh, differentiable in all four arguments, in forward mode (`torch.func.jvp`) too; 0 and
        -inf where both sides are empty.

    Raises
    ------
    ValueError
        Where a shape, dtype, device or stride is not as above.
    """
    check_tensors(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    return push_forward(
        torch.ops.longrope.merge_attention, _merge_tangents, out_a, lse_a, out_b, lse_b
    )


def _bound(name: str, value: int | Tensor | None, default: int) -> tuple[int, Tensor | None]:
    """Split a bound into the scalar and the tensor that the op takes."""
    if value is None:
        return default, None
    if isinstance(value, Tensor):
        return 0, value
    expect(is_int64(value), name, "an int or int64 [B]", value)
    return value, None


_ARGUMENTS = argument_names("attention")


def _attention_setup(ctx, inputs, output):
    keep_arguments(ctx, _ARGUMENTS, inputs, *output)


def _attention_backward(ctx, grad_out, grad_lse):
    arguments, (out, lse) = kept_arguments(ctx)
    grads = torch.ops.longrope.attention_backward(
        stride_1(grad_out), grad_lse, out=out, lse=lse, **arguments
    )
    return *grads, *[None] * (len(_ARGUMENTS) - 3)


torch.library.register_autograd(
    "longrope::attention", _attention_backward, setup_context=_attention_setup
)
torch.library.register_autograd(
    "longrope::attention_rotated",
    _rotated_attention.backward,
    setup_context=_rotated_attention.setup,
)


def _no_second_derivative(ctx, *grads):
    raise NotImplementedError("attention: no second derivative")


torch.library.register_autograd("longrope::attention_backward", _no_second_derivative)


def _merge_setup(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _merge_shares(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return each side's share of the union `[B, H, N, 1]`, and how far the outputs are apart."""
    # exp(lse_a - lse) as sigmoid(lse_a - lse_b): infinities of one sign are equal, an empty side
    # has no part.
    difference = torch.where(lse_a == lse_b, 0, lse_a - lse_b)
    share_a = torch.sigmoid(difference).masked_fill(lse_a == -torch.inf, 0)[..., None]
    share_b = torch.sigmoid(-difference).masked_fill(lse_b == -torch.inf, 0)[..., None]
    apart = out_a.to(lse_a.dtype).masked_fill(share_a == 0, 0)
    return share_a, share_b, apart - out_b.masked_fill(share_b == 0, 0)


def _merge_backward(ctx, grad_out, grad_lse):
    out_a, lse_a, out_b, lse_b = ctx.saved_tensors
    share_a, share_b, apart = _merge_shares(out_a, lse_a, out_b, lse_b)
    wide, grad_lse = grad_out.to(lse_a.dtype), grad_lse[..., None]
    moved = share_a * share_b * (wide * apart).sum(-1, keepdim=True)
    return (
        (share_a * wide).to(out_a.dtype),
        (share_a * grad_lse + moved).squeeze(-1),
        (share_b * wide).to(out_b.dtype),
        (share_b * grad_lse - moved).squeeze(-1),
    )


def _merge_tangents(primals: list[Tensor], moves: list[Tensor]) -> tuple[Tensor, Tensor]:
    share_a, share_b, apart = _merge_shares(*primals)
    of_out_a, of_lse_a, of_out_b, of_lse_b = moves
    of_lse_a, of_lse_b = of_lse_a[..., None], of_lse_b[..., None]
    wide = of_lse_a.dtype
    of_out = share_a * of_out_a.to(wide) + share_b * of_out_b.to(wide)
    of_out = of_out + share_a * share_b * (of_lse_a - of_lse_b) * apart
    return of_out.to(primals[0].dtype), (share_a * of_lse_a + share_b * of_lse_b).squeeze(-1)


torch.library.register_autograd(
    "longrope::merge_attention", _merge_backward, setup_context=_merge_setup
)
