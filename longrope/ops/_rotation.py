"""The rotation that attention does itself: a description, so that it needs no kernels."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from longrope.ops._arguments import check_frequencies, check_positions, expect

__all__ = ["Rotation"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How `ops.attention` turns queries and keys that come un-rotated.

    With `limits` there are `T` tiers, and the query decides: at position `p` it takes the first
    tier `t` with `p < limits[t]`, the last tier beyond, and that tier turns the query *and all the
    keys that it sees*. What a query attends so depends on nothing behind it: neither on how long
    its row grows, nor on other rows, nor on where a prefill was cut.

    Parameters
    ----------
    inv_freq : float64 `[R/2]` or `[B, R/2]`; with limits `[T, R/2]` or `[B, T, R/2]`
        Radians per token; a row of the batch may have its own. By groups of heads, as in
        `ops.rope`, `[B or 1, G, R/2]`; with limits `[B or 1, G, T, R/2]`.
    query_positions, key_positions : int64 `[N]` or `[B, N]`, `[M]` or `[B, M]`
        Positions of the queries and of the keys; may be negative. With limits the tiers of the
        queries (those in `query_range`) must not fall along a row; positions as such may (left
        padding).
    start_tokens : int or int64 `[B]`; with limits int, int64 `[T]` or `[B, T]`
        Positions below it turn by `base_inv_freq` (n_hat of the paper); 0 for none.
    base_inv_freq : float64 `[R/2]` or `[B, R/2]`, optional
        The original frequencies; required with `start_tokens`.
    attention_factor : float or tensor `[]` or `[B]`; with limits also `[T]` or `[B, T]`
        Multiplies the rotated dimensions of queries and of keys. With groups also `[B or 1, G]`;
        with limits `[B or 1, G, T]`.
    interleaved : bool
        Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.
    limits : int64 `[T]`, optional
        The position at which each tier ends, strictly growing; the last tier has no end.

    Raises
    ------
    ValueError
        Where a dtype or shape is not as above. Values are checked by `ops.attention`, on CPU: on
        CUDA, where looking would wait for the device, the result of a row whose tiers fall is NaN
        (but for queries that see no key).
    """

    inv_freq: Tensor
    query_positions: Tensor
    key_positions: Tensor
    start_tokens: int | Tensor = 0
    base_inv_freq: Tensor | None = None
    attention_factor: float | Tensor = 1.0
    interleaved: bool = False
    limits: Tensor | None = None

    def __post_init__(self) -> None:
        """Check dtypes and shapes; batch and token counts are checked against the tensors later."""
        tiers = None
        if self.limits is not None:
            expect(
                isinstance(self.limits, Tensor) and self.limits.dtype == torch.int64
                and self.limits.dim() == 1 and self.limits.shape[0] > 0,
                "limits", "int64 [T]", self.limits,
            )  # fmt: skip
            tiers = self.limits.shape[0]
        check_frequencies(
            self.inv_freq, self.start_tokens, self.base_inv_freq, self.attention_factor,
            tiers=tiers, heads=(),
        )  # fmt: skip
        check_positions("query_positions", self.query_positions)
        check_positions("key_positions", self.key_positions)

    @property
    def groups(self) -> int | None:
        """The groups of heads with frequencies of their own; None: all heads turn alike."""
        grouped = self.inv_freq.dim() == (3 if self.limits is None else 4)
        return self.inv_freq.shape[1] if grouped else None

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors among the fields, by name."""
        named = {name: getattr(self, name) for name in _FIELDS}
        return {name: value for name, value in named.items() if isinstance(value, Tensor)}

    def by_tier(self) -> tuple[Tensor, int | Tensor, float | Tensor]:
        """Return inv_freq, start_tokens and attention_factor in tiers: one without limits.

        Tensors are `[T, R/2]` or `[B, T, R/2]`, `[T]` or `[B, T]`, and of float64; by groups of
        heads `[B or 1, G, T, R/2]` and `[B or 1, G, T]`.
        """
        inv_freq, starts, factors = self.inv_freq, self.start_tokens, self.attention_factor
        if self.limits is None:
            inv_freq = inv_freq.unsqueeze(-2)
            starts = starts.unsqueeze(-1) if isinstance(starts, Tensor) else starts
            factors = factors.unsqueeze(-1) if isinstance(factors, Tensor) else factors
        elif isinstance(factors, Tensor) and factors.dim() == 0:
            factors = factors.expand(inv_freq.shape[-2])
        if isinstance(factors, Tensor):
            factors = factors.to(torch.float64)
        return inv_freq, starts, factors


#: torch.compile of torch 2.11 traces neither `vars` nor `dataclasses.fields` of a frozen instance.
_FIELDS = tuple(field.name for field in fields(Rotation))
