"""The search space of LongRoPE2 (arXiv 2502.20082): only pairs from a critical one on are free.

Pairs that turn less than once in the original window never showed the model a whole period there,
and must be rescaled by at least the extension ratio s for its longest distances to look familiar.
In theory the first of them is the critical one; LongRoPE2 finds that pairs that turned a few times
are too little trained as well, and searches the critical pair among those that turn up to 10 times.
From it on, lambda is searched in [s, 2 s]. The faster pairs follow an NTK-like change of the base,
`lambda_i = lambda_critical^(i / critical)`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from longrope.factor_search.space import STEPS, Candidate, SearchSpace
from longrope.factors.rules import pair_that_turns

#: Turns in the original window of the fastest pair that may be the critical one.
MOST_TURNS = 10
#: The upper bound of lambda over the extension ratio.
BOUND_OVER_RATIO = 2


def critical_pair(
    original_length: int, rope_theta: float, rotary_dim: int, turns: float = 1
) -> int:
    """Return the first pair that turns `turns` times or less in the original window.

    Not limited to the pairs there are. With 1 turn it is the theoretical critical pair: 31 of
    Phi3-mini, 35 of LLaMA3-8B.
    """
    return math.ceil(pair_that_turns(turns, original_length, rope_theta, rotary_dim))


@dataclass(frozen=True)
class CriticalSpace:
    """Non-decreasing lambdas of `dims` pairs that are free from a critical pair on.

    There they lie in `[least, upper]` hundredths. `Candidate.critical_pair` lies in
    `[first, last]`; below it lambda follows from the factor at the critical pair, rounded to the
    grid. The interface is that of `SearchSpace`.
    """

    dims: int
    upper: int
    least: int
    first: int
    last: int
    start_tokens: tuple[int, ...]
    lower: int = STEPS

    @classmethod
    def of(
        cls,
        original_length: int,
        target_length: int,
        rope_theta: float,
        rotary_dim: int,
        max_lambda: float | None,
        start_tokens: Sequence[int],
    ) -> CriticalSpace:
        """Build the space with lambda from the ratio s to `max_lambda` (None: 2 s), on the grid.

        Raises `ValueError` where no pair can be critical, or the bound is below s.
        """
        ratio = target_length / original_length
        dims = rotary_dim // 2
        rope = (original_length, rope_theta, rotary_dim)
        first, last = critical_pair(*rope, MOST_TURNS), critical_pair(*rope)
        if last < 1 or first >= dims:
            turns = "less than once" if last < 1 else f"more than {MOST_TURNS} times"
            raise ValueError(
                f"critical_dimension: expected an original length in which some of the {dims} "
                f"pairs turn 1 to {MOST_TURNS} times, got {original_length}, in which all turn "
                f"{turns}"
            )
        least = math.ceil(round(ratio * STEPS, 6))
        bound = BOUND_OVER_RATIO * ratio if max_lambda is None else max_lambda
        upper = math.floor(round(bound * STEPS, 6))
        if upper < least:
            raise ValueError(
                f"max_lambda: expected at least the extension ratio {ratio:g} with "
                f"critical_dimension=True, got {max_lambda!r}"
            )
        return cls(dims, upper, least, max(first, 1), min(last, dims - 1), tuple(start_tokens))

    def __contains__(self, candidate: Candidate) -> bool:
        pair = candidate.critical_pair
        if pair is None or not self.first <= pair <= self.last:
            return False
        if len(candidate.hundredths) != self.dims:
            return False
        return self._upper_part(candidate, pair) in self._above(pair) and candidate.hundredths[
            :pair
        ] == self._below(pair, candidate.hundredths[pair])

    def snap(self, lambdas: Sequence[float], start_tokens: int | None = None) -> Candidate:
        """Return the nearest candidate, whatever its critical pair.

        For each critical pair the lambdas from it on are rounded, clipped, and raised where they
        decrease; of these candidates the nearest in squares of log lambda is taken, among equals
        the one with the last critical pair.
        """
        at = [self._snapped(lambdas, start_tokens, p) for p in range(self.last, self.first - 1, -1)]
        return min(at, key=lambda c: float(np.square(np.log(c.lambdas) - np.log(lambdas)).sum()))

    def snap_like(self, lambdas: Sequence[float], candidate: Candidate) -> Candidate:
        """As `snap` with the critical pair and the start tokens of a candidate in the space."""
        return self._snapped(lambdas, candidate.start_tokens, candidate.critical_pair)

    def start(self) -> Candidate:
        """Return LongRoPE2's start: the base changed for s at the theoretical critical pair."""
        ratio = np.full(self.dims, self.least / STEPS)
        return self._snapped(ratio, None, self.last)

    def mutate(
        self, parent: Candidate, probability: float, random: np.random.Generator
    ) -> Candidate:
        """Redraw the critical pair, each factor from it on and n_hat, each with `probability`.

        A parent outside the space, such as PI, is snapped first. The critical pair is drawn
        uniformly; factors that become free by that are raised to s, and then mutate as those of a
        `SearchSpace` do.
        """
        parent = self._inside(parent)
        pair = parent.critical_pair
        if random.random() < probability:
            pair = int(random.integers(self.first, self.last, endpoint=True))
        child = self._above(pair).mutate(self._upper_part(parent, pair), probability, random)
        return self._completed(child, pair)

    def crossover(self, a: Candidate, b: Candidate, random: np.random.Generator) -> Candidate:
        """Take the critical pair, each factor from it on and n_hat from either parent.

        Factors below s, which a parent with a later critical pair has, are raised to s; then the
        factors are sorted as in `SearchSpace.crossover`.
        """
        a, b = self._inside(a), self._inside(b)
        pair = a.critical_pair if random.random() < 0.5 else b.critical_pair
        parts = self._upper_part(a, pair), self._upper_part(b, pair)
        return self._completed(self._above(pair).crossover(*parts, random), pair)

    def free(self, candidate: Candidate) -> np.ndarray:
        """Return the matrix `[dims, free]` that maps the free log lambdas to all of them.

        The free ones are those from the candidate's critical pair on.
        """
        pair = candidate.critical_pair
        matrix = np.zeros((self.dims, self.dims - pair))
        matrix[: pair + 1, 0] = np.arange(pair + 1) / pair
        matrix[pair + 1 :, 1:] = np.eye(self.dims - pair - 1)
        return matrix

    def _inside(self, candidate: Candidate) -> Candidate:
        if candidate.critical_pair is not None:
            return candidate
        return self.snap(candidate.lambdas, candidate.start_tokens)

    def _above(self, pair: int) -> SearchSpace:
        return SearchSpace(self.dims - pair, self.upper, self.start_tokens, self.least)

    def _upper_part(self, candidate: Candidate, pair: int) -> Candidate:
        """Return the factors from a pair on, lifted to s where it was not free before."""
        values = candidate.hundredths[pair:]
        if candidate.critical_pair > pair:
            values = tuple(max(v, self.least) for v in values)
        return Candidate(values, candidate.start_tokens)

    def _snapped(self, lambdas: Sequence[float], start_tokens: int | None, pair: int) -> Candidate:
        return self._completed(self._above(pair).snap(lambdas[pair:], start_tokens), pair)

    def _completed(self, above: Candidate, pair: int) -> Candidate:
        below = self._below(pair, above.hundredths[0])
        return Candidate(below + above.hundredths, above.start_tokens, critical_pair=pair)

    def _below(self, pair: int, at_pair: int) -> tuple[int, ...]:
        curve = (at_pair / STEPS) ** (np.arange(pair) / pair)
        return tuple(int(v) for v in np.rint(curve * STEPS))
