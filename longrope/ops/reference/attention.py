"""The specification of attention and merge_attention: the mask is a matrix, gradients by autograd.

Everything is computed in the dtype of the inputs, so that float64 inputs give the exact result and
low precision inputs what plain torch would.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from longrope.ops._rotation import Rotation
from longrope.ops.reference.rope import rope

__all__ = ["attention", "merge_attention", "visible_keys"]


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
    if rotation is not None:
        turn = (rotation.inv_freq, rotation.start_tokens, rotation.base_inv_freq,
                rotation.attention_factor, rotation.interleaved)  # fmt: skip
        q, _ = rope(q, q[:, :0], rotation.query_positions, *turn)
        k, _ = rope(k, k[:, :0], rotation.key_positions, *turn)
    seen = visible_keys(q, k, causal, query_start, key_length, key_start, window, query_range)
    # What nobody sees has no influence, whatever it holds.
    q = q.masked_fill(~seen.any(2)[:, None, :, None], 0)
    k, v = (x.masked_fill(~seen.any(1)[:, None, :, None], 0) for x in (k, v))

    group = q.shape[1] // max(k.shape[1], 1)
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = q @ k.mT * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], -torch.inf)
    lse = scores.logsumexp(-1) if k.shape[2] else scores.new_full(scores.shape[:3], -torch.inf)
    shift = lse.masked_fill(lse == -torch.inf, 0)  # a row without keys: exp(-inf - 0) = 0
    out = torch.exp(scores - shift[..., None]) @ v
    lse = lse.to(torch.float64 if q.dtype == torch.float64 else torch.float32)
    return (out, lse) if return_lse else out


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
