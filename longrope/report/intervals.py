"""Intervals of 95 %: how far a figure of few trials may be off."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

#: Draws of a bootstrap: the ends of the interval move by a hundredth of its width between seeds.
DRAWS = 2000


def proportion_interval(successes: int, trials: int, level: float = 0.95) -> tuple[float, float]:
    """Return the exact interval of a proportion (Clopper and Pearson, 1934).

    10 of 10 gives `(0.69, 1.0)`. No trials say nothing: `(0.0, 1.0)`.
    """
    tail = (1 - level) / 2
    low = high = None
    if successes == 0:
        low = 0.0
    if successes == trials:
        high = 1.0
    # P(X >= successes | p) rises with p, P(X <= successes | p) falls.
    if low is None:
        low = _root(lambda p: 1 - _cumulative(successes - 1, trials, p) - tail)
    if high is None:
        high = _root(lambda p: tail - _cumulative(successes, trials, p))
    return low, high


def bootstrap_interval(
    values: Sequence[float],
    level: float = 0.95,
    seed: int = 0,
    weights: Sequence[float] | None = None,
) -> tuple[float, float]:
    """Return the percentile interval of the mean of values, drawn again with replacement.

    With `weights` the values are sums over so many things each, and the mean is that of a thing.
    """
    array = np.asarray(values, np.float64)
    if not array.size:
        return math.nan, math.nan
    random = np.random.default_rng(seed)
    of = np.ones_like(array) if weights is None else np.asarray(weights, np.float64)
    drawn = (random.integers(array.size, size=array.size) for _ in range(DRAWS))
    means = [array[each].sum() / of[each].sum() for each in drawn]
    tail = (1 - level) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


def _cumulative(most: int, trials: int, p: float) -> float:
    """Return P(X <= most) of a binomial, `0 < p < 1`; by logarithms, as n! overflows."""
    whole = math.lgamma(trials + 1)
    return math.fsum(
        math.exp(
            whole - math.lgamma(k + 1) - math.lgamma(trials - k + 1)
            + k * math.log(p) + (trials - k) * math.log1p(-p)
        )
        for k in range(most + 1)
    )  # fmt: skip


def _root(rising) -> float:
    """Return where a rising function of a probability is 0, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < 0 else (low, middle)
    return (low + high) / 2
