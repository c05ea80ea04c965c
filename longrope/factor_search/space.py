"""The search space of LongRoPE (section 3.3 and Table 4 of the paper) and moves inside it.

A candidate keeps its rescale factors as integers of hundredths, the paper's step of 0.01: equal
candidates are equal tuples, and no tolerance decides what was seen before. Every move gives a
non-decreasing candidate within the bounds by construction; nothing is drawn and rejected.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

#: Steps of the grid in 1.0 (the paper's step size is 0.01).
STEPS = 100
#: The paper's candidates for n_hat, the number of start tokens that keep the original angles.
START_TOKENS = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
#: A redrawn factor's bounds lie 1 to dims / REACH pairs away, uniformly. Always 1 is what the
#: official code does. On losses with a known optimum the larger steps beside the small ones more
#: than halved the distance to it after 400 evaluations with 64 pairs, and changed nothing with 12.
REACH = 10
#: The upper bound of lambda over the extension ratio (Table 4: lambda in [1.0, 1.25 s]).
BOUND_OVER_RATIO = 1.25
#: The bound in hundredths where there is none: at it no pair turns any more, and it is a number
#: that JSON and float64 have.
TOP = STEPS * 10**12


@dataclass(frozen=True)
class Candidate:
    """One point of the search space: lambda of each pair in hundredths, and n_hat.

    `attention_factor` is set where it was learned, and None where it is that of the problem.
    With `from_base` lambdas count from the base even where those of the others multiply a model's
    own scaling; such a candidate lies in no space.
    `critical_pair` is the first free pair of a candidate in a `CriticalSpace`, and None elsewhere.
    """

    hundredths: tuple[int, ...]
    start_tokens: int = 0
    attention_factor: float | None = None
    critical_pair: int | None = None
    from_base: bool = False

    @property
    def lambdas(self) -> tuple[float, ...]:
        """The rescale factors as numbers."""
        return tuple(h / STEPS for h in self.hundredths)


@dataclass(frozen=True)
class SearchSpace:
    """Non-decreasing lambdas of `dims` pairs in `[lower, upper]` hundredths; choices of n_hat."""

    dims: int
    upper: int
    start_tokens: tuple[int, ...] = START_TOKENS
    lower: int = STEPS

    @classmethod
    def of(
        cls, dims: int, max_lambda: float, start_tokens: Sequence[int] = START_TOKENS
    ) -> SearchSpace:
        """Build the space with lambda from 1 to `max_lambda`, rounded down to the grid."""
        upper = math.floor(round(max_lambda * STEPS, 6))
        return cls(dims, upper, tuple(start_tokens))

    def __contains__(self, candidate: Candidate) -> bool:
        bounded = (self.lower, *candidate.hundredths, self.upper)
        return (
            not candidate.from_base
            and len(candidate.hundredths) == self.dims
            and all(a <= b for a, b in itertools.pairwise(bounded))
            and candidate.start_tokens in self.start_tokens
        )

    def snap(self, lambdas: Sequence[float], start_tokens: int | None = None) -> Candidate:
        """Round factors to the grid, clip them to the bounds and lift any that fall back."""
        grid = np.rint(np.asarray(lambdas, np.float64) * STEPS)
        grid = np.maximum.accumulate(np.clip(grid, self.lower, self.upper))
        chosen = self.start_tokens[0] if start_tokens is None else start_tokens
        return Candidate(tuple(int(v) for v in grid), chosen)

    def snap_like(self, lambdas: Sequence[float], candidate: Candidate) -> Candidate:
        """As `snap` with the start tokens of a candidate."""
        return self.snap(lambdas, candidate.start_tokens)

    def free(self, candidate: Candidate) -> np.ndarray:
        """Return the matrix that maps the free log lambdas, the last ones, to all: the identity."""
        return np.eye(self.dims)

    @property
    def least(self) -> int:
        """The lower bound of a free factor, in hundredths."""
        return self.lower

    def mutate(
        self, parent: Candidate, probability: float, random: np.random.Generator
    ) -> Candidate:
        """Redraw each factor with `probability`, uniformly between those near it; n_hat too.

        The paper draws from the whole range and keeps children that happen to be non-decreasing:
        those whose redrawn factors lie between their neighbours. Here a factor is drawn between
        the factors a few pairs (`REACH`) to its left and right, and the pairs in between make way:
        those before it come down to it, those after it come up. Nothing is retried, the cost is
        O(dims), and the plateaus of PI and YaRN, whose members have no room between their
        neighbours, can change far from their ends.
        """
        values = list(parent.hundredths)
        chosen = np.flatnonzero(random.random(self.dims) < probability)
        reaches = random.integers(1, max(1, self.dims // REACH), size=len(chosen), endpoint=True)
        # In any order: no drift towards either end.
        for i, reach in zip(random.permutation(chosen), reaches, strict=True):
            low = values[i - reach] if i >= reach else self.lower
            high = values[i + reach] if i + reach < self.dims else self.upper
            values[i] = int(random.integers(low, high, endpoint=True))
            for j in range(max(i - reach + 1, 0), i):
                values[j] = min(values[j], values[i])
            for j in range(i + 1, min(i + reach, self.dims)):
                values[j] = max(values[j], values[i])
        start_tokens = parent.start_tokens
        if random.random() < probability:
            start_tokens = self.start_tokens[random.integers(len(self.start_tokens))]
        return Candidate(tuple(values), start_tokens)

    def crossover(self, a: Candidate, b: Candidate, random: np.random.Generator) -> Candidate:
        """Take each factor and n_hat from either parent, then sort the factors.

        Sorting repairs the order without a bias up or down (a running maximum only lifts) and
        stays between the parents: where `low_i <= c_i <= high_i` with non-decreasing `low` (the
        smaller parent per dimension) and `high` (the larger one), the sorted `c` obeys them too.
        """
        from_a = random.random(self.dims) < 0.5
        values = np.sort(np.where(from_a, a.hundredths, b.hundredths))
        start_tokens = a.start_tokens if random.random() < 0.5 else b.start_tokens
        return Candidate(tuple(int(v) for v in values), start_tokens)
