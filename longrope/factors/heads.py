"""Factors of their own for every layer and head: what `RescaleFactors` does with them."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope._validation import positive

if TYPE_CHECKING:
    from longrope.factors.rescale import RescaleFactors


class PerHead:
    """What `RescaleFactors` inherits: its lambdas are `[R/2]`, or `[L, Hk, R/2]` by layer and head.

    `L` counts the attention layers and `Hk` the key/value heads, whose query heads turn as they do;
    `Hk = 1` is one set for all heads of a layer. The attention factors are `[L, Hk]` then.
    """

    @property
    def per_head(self) -> bool:
        """Whether layers, or layers and heads, have factors of their own."""
        return self.lambdas.ndim > 1

    @property
    def heads(self) -> tuple[int, int] | None:
        """`(L, Hk)`, or None for one set for all."""
        return self.lambdas.shape[:2] if self.per_head else None

    def layer(self, index: int) -> RescaleFactors:
        """Return the factors of one layer: lambdas `[1, Hk, R/2]`, or `[R/2]` where heads share.

        Factors for all layers alike are returned as they are.
        """
        if not self.per_head:
            return self
        if self.heads[1] == 1:
            factor = float(self.attention_factor[index, 0])
            return self.replace(lambdas=self.lambdas[index, 0], attention_factor=factor)
        one = slice(index, index + 1)
        return self.replace(lambdas=self.lambdas[one], attention_factor=self.attention_factor[one])

    def mean(self) -> RescaleFactors:
        """Return one set for all layers and heads: the one nearest in log lambda.

        The geometric mean of the lambdas, and that of the attention factors. Factors for all layers
        and heads alike are returned as they are.
        """
        if not self.per_head:
            return self
        return self.replace(
            lambdas=np.exp(np.log(self.lambdas).mean((0, 1))),
            attention_factor=math.exp(np.log(self.attention_factor).mean()),
        )

    def spread(self, layers: int, heads: int) -> RescaleFactors:
        """Return the same factors with lambdas `[layers, heads, R/2]`.

        Raises `ValueError` where there are those of other layers or heads already.
        """
        shape = (layers, heads)
        if self.per_head and any(
            had not in (1, want) for had, want in zip(self.heads, shape, strict=True)
        ):
            raise ValueError(
                f"factors: expected those of {layers} layers and {heads} or 1 heads each, got "
                f"{self.heads[0]} and {self.heads[1]}"
            )
        return self.replace(
            lambdas=np.broadcast_to(self.lambdas, (*shape, self.lambdas.shape[-1])),
            attention_factor=np.broadcast_to(self.attention_factor, shape),
        )


def attention_factors(value: Any, heads: tuple[int, ...] | None) -> float | np.ndarray:
    """Return a checked attention factor, float64 `[L, Hk]` beside lambdas by layer and head.

    There one number stands for all of them.
    """
    if heads is None:
        if isinstance(value, np.ndarray) and value.ndim:
            raise ValueError(
                "attention_factor: expected a number beside lambdas for all layers and heads, got "
                f"shape {list(value.shape)}"
            )
        return positive("attention_factor", value)
    expected = f"attention_factor: expected positive numbers {list(heads)}, as lambdas have them"
    try:
        if hasattr(value, "detach"):
            value = value.detach().double().cpu().numpy()
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"{expected}, got {type(value).__name__} that is no array") from None
    if array.ndim == 0:
        array = np.full(heads, array)
    if array.shape != heads:
        raise ValueError(f"{expected}, got shape {list(array.shape)}")
    wrong = ~((array > 0) & np.isfinite(array))
    if wrong.any():
        raise ValueError(f"{expected}, got {array[wrong][0]}")
    array.flags.writeable = False
    return array


def span(values: float | np.ndarray, digits: int = 4) -> str:
    """Return a number, or the least and the most of several, as text."""
    least, most = float(np.min(values)), float(np.max(values))
    if least == most:
        return f"{least:.{digits}g}"
    return f"{least:.{digits}g} to {most:.{digits}g}"
