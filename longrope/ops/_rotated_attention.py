"""The gradient of attention that turns queries and keys itself: tier after tier.

Queries and keys are turned anew for each tier, whose queries alone then have gradients, and the
gradients turned back: one tier's turned keys are alive at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from longrope.ops._arguments import argument_names
from longrope.ops._autograd import keep_arguments, kept_arguments, stride_1

__all__ = ["backward", "setup"]

_ARGUMENTS = argument_names("attention_rotated")
# What attention_backward takes of them, but for the range of queries.
_OPTIONS = [
    name
    for name in argument_names("attention_backward")
    if name in _ARGUMENTS and name not in ("q", "k") and not name.startswith("query_end")
    and not name.startswith("query_begin")
]  # fmt: skip
_ANGLES = ("inv_freq", "base_inv_freq", "attention_factor_tiers")


def setup(ctx, inputs, output) -> None:
    """Keep everything."""
    keep_arguments(ctx, _ARGUMENTS, inputs, *output)


def backward(ctx, grad_out: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    """Return the gradients of q, k, v, the frequencies and the attention factors."""
    arguments, (out, lse) = kept_arguments(ctx)
    needs = dict(zip(_ARGUMENTS, ctx.needs_input_grad, strict=True))
    needs_angles = any(needs[name] for name in _ANGLES)
    grad_out, q, k = stride_1(grad_out), arguments["q"], arguments["k"]
    q_positions, k_positions = arguments["query_positions"], arguments["key_positions"]
    options = {name: arguments[name] for name in _OPTIONS}
    inv_freq, base = arguments["inv_freq"], arguments["base_inv_freq"]
    tiers = inv_freq.shape[-2]
    # Sums over tiers lose nothing to 16 bits.
    wide = torch.promote_types(q.dtype, torch.float32) if tiers > 1 else q.dtype

    sums: list[Any] = [0, 0, 0]
    angles = []
    for turn, queries in _tiers(arguments, tiers):
        grad_q, grad_k, grad_v = torch.ops.longrope.attention_backward(
            grad_out, grad_lse, _turn(q, q_positions, turn), _turn(k, k_positions, turn),
            out=out, lse=lse, **options, **queries,
        )  # fmt: skip
        if needs_angles:
            angles += [
                _turn_gradients(grad_q, q, q_positions, turn),
                _turn_gradients(grad_k, k, k_positions, turn),
            ]
        grads = (
            _turn(grad_q, q_positions, turn, inverse=True),
            _turn(grad_k, k_positions, turn, inverse=True),
            grad_v,
        )
        sums = [a + b.to(wide) for a, b in zip(sums, grads, strict=True)]

    result = dict.fromkeys(_ARGUMENTS)
    result |= {name: s.to(q.dtype) for name, s in zip("qkv", sums, strict=True)}
    if needs_angles:
        to_inv_freq, to_base, to_factor = (
            torch.stack(grads, 1).unflatten(1, (tiers, 2)).sum(2)  # of queries and keys
            for grads in zip(*angles, strict=True)
        )
        if needs["inv_freq"]:
            result["inv_freq"] = to_inv_freq.sum_to_size(inv_freq.shape)
        if needs["base_inv_freq"]:
            result["base_inv_freq"] = to_base.sum(1).sum_to_size(base.shape)
        if needs["attention_factor_tiers"]:
            factors = arguments["attention_factor_tiers"]
            result["attention_factor_tiers"] = to_factor.sum_to_size(factors.shape)
    return tuple(result.values())


def _tiers(arguments: dict[str, Any], tiers: int) -> Iterator[tuple[tuple, dict[str, Any]]]:
    """For each tier: how `longrope::rope` turns by it, and the range of its queries."""
    batch, _, queries, _ = arguments["q"].shape
    names = ("query_begin", "query_begin_rows", "query_end", "query_end_rows")
    given = {name: arguments[name] for name in names}
    spoilt = None
    if arguments["limits"] is not None:
        begin, within, tier, spoilt = _tiers_of_queries(arguments, given, batch, queries)
    for t in range(tiers):
        starts, factors = (
            None if x is None else x[..., t].expand(batch)
            for x in (arguments["start_tokens_tiers"], arguments["attention_factor_tiers"])
        )
        factor = arguments["attention_factor"]
        if spoilt is not None:
            factor_or_nan = torch.where(spoilt, torch.nan, factor if factors is None else factors)
            factors = factor_or_nan.to(torch.float64)
            before = begin + (within & (tier < t)).sum(-1)
            given["query_begin_rows"] = before
            given["query_end_rows"] = before + (within & (tier == t)).sum(-1)
        yield (
            arguments["inv_freq"][..., t, :], arguments["base_inv_freq"],
            arguments["start_tokens"], starts, factor, factors, arguments["interleaved"],
        ), given  # fmt: skip


def _tiers_of_queries(
    arguments: dict[str, Any], given: dict[str, Any], batch: int, queries: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the first query that attends, which do, their tiers, and rows whose tiers fall.

    `[B]`, bool `[B, N]`, `[B, N]`, bool `[B]`. Rows whose tiers fall, which only CUDA lets pass,
    have all their queries in the first.
    """
    positions, limits = arguments["query_positions"], arguments["limits"]

    def bound(name: str) -> Tensor:
        rows = given[name + "_rows"]
        if rows is None:
            rows = torch.full((batch,), given[name], dtype=torch.int64, device=positions.device)
        return rows.clamp(0, queries)

    begin, end = bound("query_begin"), bound("query_end")
    index = torch.arange(queries, device=positions.device)
    within = (index >= begin[:, None]) & (index < end[:, None])
    tier = torch.bucketize(positions, limits[:-1], right=True).expand(batch, queries)
    falls = (tier[:, 1:] < tier[:, :-1]) & within[:, 1:] & within[:, :-1]
    spoilt = falls.any(-1)
    return begin, within, tier.masked_fill(spoilt[:, None], 0), spoilt


def _turn(x: Tensor, positions: Tensor, turn: tuple, inverse: bool = False) -> Tensor:
    turned, _ = torch.ops.longrope.rope(x, x[:, :0], positions, *turn, inverse)
    return turned


def _turn_gradients(
    grad: Tensor, x: Tensor, positions: Tensor, turn: tuple
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of the frequencies `[B, R/2]`, the base ones, and the factor `[B]`."""
    # Tokens that have no part may hold anything.
    x = x.masked_fill((grad == 0).all(-1, keepdim=True), 0)
    return torch.ops.longrope.rope_backward(grad, grad[:, :0], x, x[:, :0], positions, *turn, False)
