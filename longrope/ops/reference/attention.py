"""The specification of attention and merge_attention: the mask is a matrix, gradients by autograd.

Everything is computed in the dtype of the inputs, so that float64 inputs give the exact result and
low precision inputs what plain torch would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrope.ops._arguments import expect
from longrope.ops._rotation import Rotation
from longrope.ops.reference.rope import rope

__all__ = ["attention", "merge_attention", "query_tiers", "visible_keys"]


def visible_keys(
    q: Tensor,
    k: Tensor,
    causal: bool = True,
    query_start: int | Tensor | None = None,
    key_length: int | Tensor | None = None,
    key_start: int | Tensor | None = None,
    window: int | None = None,
    query_range: tuple[int | Tensor, int | Tensor] | None = None,
) -> Tensor:
    """Return which keys each query sees, bool `[B, N, M]`."""
    batch, queries, keys = q.shape[0], q.shape[2], k.shape[2]

    def rows(bound: int | Tensor | None, default: int) -> Tensor:
        value = torch.as_tensor(default if bound is None else bound, device=q.device)
        return value.expand(batch).reshape(batch, 1, 1)

    query = torch.arange(queries, device=q.device)[:, None]
    position = rows(query_start, keys - queries) + query
    key = torch.arange(keys, device=q.device)
    seen = (key >= rows(key_start, 0)) & (key < rows(key_length, keys))
    if causal:
        seen = seen & (key <= position)
    if window is not None:
        seen = seen & (key > position - window)
    begin, end = query_range or (None, None)
    seen = seen & (query >= rows(begin, 0)) & (query < rows(end, queries))
    return seen.expand(batch, queries, keys)


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
    """See `longrope.ops.attention`."""
    seen = visible_keys(q, k, causal, query_start, key_length, key_start, window, query_range)
    scale = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    if rotation is None:
        out, lse = _attend(q, k, v, seen, scale, softcap)
        return (out, lse) if return_lse else out
    inv_freq, starts, factors = rotation.by_tier()
    tiers = torch.zeros(1, q.shape[2], dtype=torch.int64, device=q.device)
    if rotation.limits is not None:
        tiers = query_tiers(rotation, q, query_range)
    whole: tuple[Tensor, Tensor] | None = None
    for tier in range(inv_freq.shape[-2]):
        start, factor = (
            _of_tier(x, tier, q.shape[0]) if isinstance(x, Tensor) else x for x in (starts, factors)
        )
        turn = (inv_freq[..., tier, :], start, rotation.base_inv_freq, factor, rotation.interleaved)
        q_turned, _ = rope(q, q[:, :0], rotation.query_positions, *turn)
        k_turned, _ = rope(k, k[:, :0], rotation.key_positions, *turn)
        own = tiers == tier
        out, lse = _attend(q_turned, k_turned, v, seen & own[..., None], scale, softcap)
        if whole is not None:
            out = whole[0] + out  # 0 where a query is of another tier
            lse = torch.where(own[:, None], lse, whole[1])
        whole = out, lse
    return whole if return_lse else whole[0]


def _of_tier(values: Tensor, tier: int, batch: int) -> Tensor:
    """Return the values of a tier by row, or `[B or 1, G]` by group of heads."""
    values = values[..., tier]
    return values if values.dim() > 1 else values.expand(batch)


def query_tiers(
    rotation: Rotation, q: Tensor, query_range: tuple[int | Tensor, int | Tensor] | None = None
) -> Tensor:
    """Return the tier of each query, int64 `[B, N]`: the first whose limit is beyond its position.

    Refuses limits that do not grow and rows whose tiers fall.
    """
    limits, positions = rotation.limits, rotation.query_positions
    growing = limits[1:] > limits[:-1]
    expect(bool(growing.all()), "limits", "growing positions", limits.tolist())
    batch, _, queries, _ = q.shape
    tiers = (positions[..., None] >= limits[:-1]).sum(-1).expand(batch, queries)
    attends = visible_keys(q, q, False, query_range=query_range)[:, :, :1].squeeze(-1)
    falls = (tiers[:, 1:] < tiers[:, :-1]) & attends[:, 1:] & attends[:, :-1]
    expect(
        not bool(falls.any()), "query_positions", "tiers that do not fall along a row",
        tiers.tolist(),
    )  # fmt: skip
    return tiers


def _attend(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    # What nobody sees has no influence, whatever it holds.
    q = q.masked_fill(~seen.any(2)[:, None, :, None], 0)
    k, v = (x.masked_fill(~seen.any(1)[:, None, :, None], 0) for x in (k, v))

    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:3], -torch.inf)
    shift = lse.masked_fill(lse == -torch.inf, 0)  # a row without keys: exp(-inf - 0) = 0
    out = torch.exp(scores - shift[..., None]) @ v
    return out, lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)


def merge_attention(
    out_a: Tensor, lse_a: Tensor, out_b: Tensor, lse_b: Tensor
) -> tuple[Tensor, Tensor]:
    """See `longrope.ops.merge_attention`."""
    empty = (lse_a == -torch.inf) & (lse_b == -torch.inf)
    a, b = (lse.masked_fill(empty, 0) for lse in (lse_a, lse_b))
    lse = torch.logaddexp(a, b).masked_fill(empty, -torch.inf)
    difference = torch.where((a == b) & a.isinf(), 0, a - b)

    def weighted(out: Tensor, difference: Tensor, side: Tensor) -> Tensor:
        share = torch.sigmoid(difference)  # exp(side - lse)
        share = share.masked_fill(side == -torch.inf, 0)[..., None].to(out.dtype)
        return torch.where(share == 0, 0, share * out.masked_fill(share == 0, 0))

    return weighted(out_a, difference, lse_a) + weighted(out_b, -difference, lse_b), lse
