"""The rotation that attention does itself: a description, so that it needs no kernels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from longrope.ops._arguments import check_frequencies, check_positions

__all__ = ["Rotation"]


@dataclass(frozen=True, eq=False)
class Rotation:
    """How `ops.attention` turns queries and keys that come un-rotated.

    Parameters
    ----------
    inv_freq : float64 `[R/2]` or `[B, R/2]`
        Radians per token; a row of the batch may have its own.
    query_positions, key_positions : int64 `[N]` or `[B, N]`, `[M]` or `[B, M]`
        Positions of the queries and of the keys; may be negative.
    start_tokens : int or int64 `[B]`
        Positions below it turn by `base_inv_freq` (n_hat of the paper); 0 for none.
    base_inv_freq : float64 `[R/2]` or `[B, R/2]`, optional
        The original frequencies; required with `start_tokens`.
    attention_factor : float or tensor `[]` or `[B]`
        Multiplies the rotated dimensions of queries and of keys.
    interleaved : bool
        Pairs are `(2i, 2i + 1)` instead of `(i, i + R/2)`.
    """

    inv_freq: Tensor
    query_positions: Tensor
    key_positions: Tensor
    start_tokens: int | Tensor = 0
    base_inv_freq: Tensor | None = None
    attention_factor: float | Tensor = 1.0
    interleaved: bool = False

    def __post_init__(self) -> None:
        """Check dtypes and shapes; batch and token counts are checked against the tensors later."""
        check_frequencies(
            self.inv_freq, self.start_tokens, self.base_inv_freq, self.attention_factor
        )
        check_positions("query_positions", self.query_positions)
        check_positions("key_positions", self.key_positions)
