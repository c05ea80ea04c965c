"""Factors of their own for every layer and head: what `RescaleFactors` does with them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from longrope._validation import positive, real_array

if TYPE_CHECKING:
    from longrope.factors.rescale import RescaleFactors


@dataclass(frozen=True)
class Shared:
    """One set for all layers and heads, beside factors of their own that a search found from it.

    Attributes
    ----------
    factors
        The set, for the same lengths.
    perplexity, own_perplexity
        What the search measured with such sets, in a ladder with those of all tiers, and with the
        factors by layer and head, on the windows that chose between them (the held-out ones if
        there were any); None: not known.
    """

    factors: RescaleFactors
    perplexity: float | None = None
    own_perplexity: float | None = None

    def __post_init__(self):
        if getattr(self.factors, "per_head", True):  # other types have no such thing
            raise ValueError(
                "shared: expected factors for all layers and heads alike, got "
                + ("those of each" if hasattr(self.factors, "per_head") else repr(self.factors))
            )
        for name in ("perplexity", "own_perplexity"):
            if getattr(self, name) is not None:
                positive(f"shared: {name}", getattr(self, name))

    @property
    def cost(self) -> str:
        """What taking the set in the place of the others costs, in words; "" if not measured."""
        if self.perplexity is None or self.own_perplexity is None:
            return ""
        more = 100 * (self.perplexity / self.own_perplexity - 1)
        return (
            f"with which that search measured a perplexity of {self.perplexity:.4f} instead of "
            f"{self.own_perplexity:.4f}, {more:.1f} % more"
        )


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

        Factors for all layers alike are returned as they are. `IndexError` where there is no layer
        of that number.
        """
        if not self.per_head:
            return self
        index = range(self.heads[0])[index]
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

    def one_set(self) -> RescaleFactors:
        """Return one set for all layers and heads: that of `shared` if known, else the mean.

        The mean of factors that were searched apart was never measured, and can be worse than the
        set that their search began with (docs/heads.md).
        """
        known = self._known_set()
        return self.mean() if known is None else known

    def _known_set(self) -> RescaleFactors | None:
        """Return the set for all layers and heads, where one was found."""
        if not self.per_head:
            return self
        return None if self.shared is None else self.shared.factors

    def _shared_times(self, other: RescaleFactors) -> Shared | None:
        """Return what a product knows of one set: that of sets which both factors know."""
        ours, theirs = self._known_set(), other._known_set()
        if ours is None or theirs is None or not (self.per_head or other.per_head):
            return None
        return Shared(ours * theirs)

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
    array = real_array(expected, value)
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
