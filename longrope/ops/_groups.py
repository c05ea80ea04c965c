"""Attention whose rotation differs between groups of heads: every group a row of the batch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from torch import Tensor

from longrope.ops._arguments import expect
from longrope.ops._rotation import Rotation

__all__ = ["attend_groups"]


def attend_groups(
    attention: Callable[..., tuple[Tensor, Tensor]],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rotation: Rotation,
    query_range: tuple[int | Tensor, int | Tensor] | None,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """Return what `attention` gives for each group, put together; `options` are its other ones.

    Groups of heads attend their own keys alone, so that each can be a row, which may have
    frequencies of its own. q, k and v are copied where their memory does not allow that.
    """
    batch, groups = q.shape[0], rotation.groups
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(
            x.dim() == 4 and x.shape[0] == batch and x.shape[1] % groups == 0, name,
            f"[{batch}, heads, N, D] whose heads part evenly into {groups} groups", x,
        )  # fmt: skip

    def rows(value: Any) -> Any:
        """Return what every row has once for each of its groups."""
        return value.repeat_interleave(groups, 0) if isinstance(value, Tensor) else value

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(1, (groups, -1)).flatten(0, 1)

    if query_range is not None:
        query_range = tuple(rows(bound) for bound in query_range)
    out, lse = attention(
        *map(heads, (q, k, v)),
        rotation=_of_rows(rotation, batch, rows),
        query_range=query_range,
        return_lse=True,
        **{name: rows(value) for name, value in options.items()},
    )
    return tuple(x.unflatten(0, (batch, groups)).flatten(1, 2) for x in (out, lse))


def _of_rows(rotation: Rotation, batch: int, rows: Callable[[Any], Any]) -> Rotation:
    """Return the rotation of `batch` times groups rows."""
    by_row = 1 if rotation.limits is None else 2  # dimensions of what comes by row, [B] or [B, T]

    def each(value: Any, dims: int) -> Any:
        if not isinstance(value, Tensor) or value.dim() < dims:
            return value  # the same for all rows
        if value.dim() == dims:
            return rows(value)
        return value.expand(batch, *value.shape[1:]).flatten(0, 1)

    return dataclasses.replace(
        rotation,
        inv_freq=each(rotation.inv_freq, by_row + 1),
        query_positions=each(rotation.query_positions, 2),
        key_positions=each(rotation.key_positions, 2),
        start_tokens=each(rotation.start_tokens, by_row),
        base_inv_freq=each(rotation.base_inv_freq, 2),
        attention_factor=each(rotation.attention_factor, by_row),
    )
