"""Attention whose queries come in segments, each of which turns itself and its keys its own way.

What training under tiers by position asks for: one node in the graph of gradients for all segments
of a pass, which keeps no turned keys and makes no gradient of a slice as long as the whole.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longrope.ops._arguments import argument_names, as_autocast
from longrope.ops._autograd import stride_1
from longrope.ops._forward_mode import refuse_tangents
from longrope.ops.attention import attention
from longrope.ops.rope import start_and_factor

__all__ = ["Segment", "attend_segments"]

#: What `attention_backward` takes beside tensors, and what it is for queries that end the keys.
_PLAIN = dict.fromkeys(argument_names("attention_backward")[7:]) | {
    "causal": True, "query_begin": 0, "key_start": 0, "softcap": 0.0, "window": 0,
}  # fmt: skip


class Segment(NamedTuple):
    """Queries `begin` to `end`, which see keys from `document` on; how both turn.

    `positions` int64 `[n]` or `[B, n]` are those of the tokens `document` to `end`; the rest are
    the arguments of `rope`, which have no gradient here. `key_start` and `key_length` int64 `[B]`
    count from `document`.
    """

    begin: int
    end: int
    document: int
    positions: Tensor
    inv_freq: Tensor
    start_tokens: int | Tensor
    base_inv_freq: Tensor
    attention_factor: float | Tensor
    key_start: Tensor | None = None
    key_length: Tensor | None = None

    @property
    def queries(self) -> slice:
        """Which tokens ask."""
        return slice(self.begin, self.end)

    @property
    def keys(self) -> slice:
        """Which tokens are seen."""
        return slice(self.document, self.end)

    def turned(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return its queries and keys, of all, turned."""
        return self._queries(q[:, :, self.queries]), self._turn(k[:, :, self.keys], self.positions)

    def turned_back(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients of its turned queries and keys as those of the queries and keys."""
        return self._queries(q, True), self._turn(k, self.positions, True)

    def _queries(self, q: Tensor, back: bool = False) -> Tensor:
        return self._turn(q, self.positions[..., self.begin - self.document :], back)

    def _turn(self, x: Tensor, positions: Tensor, back: bool = False) -> Tensor:
        # Straight to the op, which checks again what `rope` does: a step has hundreds of these.
        turn = positions, self.inv_freq, self.base_inv_freq
        more = start_and_factor(self.start_tokens, self.attention_factor)
        return torch.ops.longrope.rope(x, x[:, :0], *turn, *more, False, back)[0]


def attend_segments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    segments: Sequence[Segment],
    *,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, ...]:
    """Return the causal attention of each segment, `[B, H, end - begin, D]`.

    q `[B, H, N, D]`, k and v `[B, Hk, N, D]` come un-rotated, of the dtypes and strides that `rope`
    and `attention` take. The queries of segments do not overlap. Differentiable in q, k and v,
    once; sums over segments are in float32.
    """
    refuse_tangents("attend_segments", q=q, k=k, v=v)
    q, k, v = as_autocast(q), as_autocast(k), as_autocast(v)
    return _Attention.apply(q, k, v, tuple(segments), window, scale, softcap)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, segments: tuple, *options: Any) -> Any:
        window, scale, softcap = options
        outs, all_lse = [], []
        for segment in segments:
            out, lse = attention(
                *segment.turned(q, k), v[:, :, segment.keys], window=window, scale=scale,
                softcap=softcap, key_start=segment.key_start, key_length=segment.key_length,
                return_lse=True,
            )  # fmt: skip
            outs.append(out)
            all_lse.append(lse)
        ctx.segments, ctx.options = segments, options
        ctx.save_for_backward(q, k, v, *outs, *all_lse)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # a graph of the gradient is asked for
            raise NotImplementedError("attend_segments: no second derivative")
        q, k, v, *rest = ctx.saved_tensors
        segments, count = ctx.segments, len(ctx.segments)
        outs, all_lse = rest[:count], rest[count:]
        window, scale, softcap = ctx.options
        options = _PLAIN | {
            "window": window or 0, "softcap": softcap or 0.0,
            "scale": 1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        }  # fmt: skip
        wide = torch.promote_types(q.dtype, torch.float32) if count > 1 else q.dtype
        to_q = torch.zeros_like(q)
        to_k, to_v = (torch.zeros_like(x, dtype=wide) for x in (k, v))
        for segment, grad, out, lse in zip(segments, grads, outs, all_lse, strict=True):
            asking, seen = segment.end - segment.begin, segment.end - segment.document
            grad_q, grad_k, grad_v = torch.ops.longrope.attention_backward(
                stride_1(grad), None, *segment.turned(q, k), v[:, :, segment.keys], out, lse,
                **options | {
                    "query_start": seen - asking, "query_end": asking,
                    "key_length": seen if segment.key_length is None else 0,
                    "key_start_rows": segment.key_start, "key_length_rows": segment.key_length,
                },
            )  # fmt: skip
            grad_q, grad_k = segment.turned_back(grad_q, grad_k)
            to_q[:, :, segment.queries] = grad_q
            to_k[:, :, segment.keys] += grad_k
            to_v[:, :, segment.keys] += grad_v
        return to_q, to_k.to(k.dtype), to_v.to(v.dtype), None, None, None, None
