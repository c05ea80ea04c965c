"""Racing: a candidate that is clearly worse on the first windows is not measured on the others.

After Maron and Moore's Hoeffding races (1994) and F-Race (Birattari et al. 2002): candidates are
measured on more and more of the same instances, and a statistical test on the paired results drops
the losers on the way. Here the instances are blocks of tokens, and the opponent is the `parents`-th
best, the last that Algorithm 1 keeps: a candidate that does not beat it would never be a parent.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np

from longrope.factor_search.evolution import Proposal
from longrope.factor_search.history import BASELINES, Role
from longrope.factor_search.space import Candidate

#: The test comes after 1, 2, 4, ... windows: twice the windows cost one more test.
GROWTH = 2
#: Blocks of tokens that each window is cut into, the units of the test. On recorded evolutions with
#: the packaged model (5 windows of 1024 tokens, 431 candidates) 16 blocks saved 2 % more of the
#: passes than 8, for as few wrong decisions.
BLOCKS = 16
#: Probability at which the test would drop a candidate as good as the cut, were blocks independent.
#: In the same evolutions 1 of 112 dropped candidates would have been a parent, none of the 8 best.
P = 0.01
#: Fewer paired differences than this decide nothing.
FEWEST_DIFFERENCES = 6

#: What a journal's header says of a race.
SETTINGS = {"growth": GROWTH, "blocks": BLOCKS, "p": P}


class Stage(NamedTuple):
    """The search windows from `start` to `end` of a race, and the role of evaluations there."""

    start: int
    end: int
    role: Role


def stages(windows: int) -> list[Stage]:
    """Return the stages of a race over this many windows: with 5, they end after 1, 2, 4 and 5."""
    found, start, end = [], 0, 1
    while end < windows:
        found.append(Stage(start, end, Role.RACE))
        start, end = end, end * GROWTH
    return [*found, Stage(start, windows, Role.SEARCH)]


class Race:
    """The losses of generations of Algorithm 1, stage by stage.

    Called with the new proposals of a generation, it returns the mean NLL of each over all search
    windows, or infinity for those that were dropped. After every stage but the last, a candidate is
    dropped if its blocks so far are `clearly_worse` than those of the `parents`-th best among the
    parents so far and the candidates still in the race. At least `parents` of them remain, so no
    parent is lost that is not worse by that test. Baselines are never dropped.

    Parameters
    ----------
    measure
        Measures proposals in a stage and returns the mean NLL of each over all windows so far.
    block_sums
        float64 `[S, blocks]` by candidate: the sums over the blocks of all windows so far, which
        `measure` keeps up to date.
    windows
        Number of the search windows.
    parents
        How many parents the evolution keeps.
    """

    def __init__(
        self,
        measure: Callable[[Sequence[Proposal], Stage], Sequence[float]],
        block_sums: Mapping[Candidate, np.ndarray],
        windows: int,
        parents: int,
    ):
        self.measure = measure
        self.block_sums = block_sums
        self.stages = stages(windows)
        self.parents = parents
        self._best: list[np.ndarray] = []  # block sums of the parents so far, best first

    def __call__(self, proposals: Sequence[Proposal]) -> list[float]:
        losses = [math.inf] * len(proposals)
        running = list(range(len(proposals)))
        for stage in self.stages:
            measured = self.measure([proposals[i] for i in running], stage)
            so_far = dict(zip(running, measured, strict=True))
            running = [i for i in running if math.isfinite(so_far[i])]
            if stage is not self.stages[-1]:
                running = self._remaining(proposals, running, stage)
        for i in running:
            losses[i] = so_far[i]
        finished = [self.block_sums[proposals[i].candidate] for i in running]
        # Stable, as in the evolution: of equal losses the earlier one stays.
        self._best = sorted([*self._best, *finished], key=np.sum)[: self.parents]
        return losses

    def _remaining(
        self, proposals: Sequence[Proposal], running: list[int], stage: Stage
    ) -> list[int]:
        sums = {i: self.block_sums[proposals[i].candidate] for i in running}
        members = sorted([*(best[: stage.end] for best in self._best), *sums.values()], key=np.sum)
        if len(members) < self.parents:
            return running
        cut = members[self.parents - 1]
        return [
            i
            for i in running
            if proposals[i].origin in BASELINES or not clearly_worse((sums[i] - cut).ravel())
        ]


def clearly_worse(differences: np.ndarray, p: float | None = None) -> bool:
    """Say whether a candidate is worse than its opponent by a one-sided paired Student t test.

    `differences`, `[n]`, are the candidate's losses minus the opponent's, in sums over blocks of
    tokens of the same windows. The test assumes that they are independent. Neighbouring blocks of
    one document are not, but with few documents there is nothing else to count: hence a small `p`
    (None: `P`), which is no bound on the share of wrong decisions. Never true of a candidate whose
    losses are in sum at least as good.
    """
    n = len(differences)
    mean = float(np.mean(differences))
    if n < FEWEST_DIFFERENCES or not mean > 0:
        return False
    return mean > student_t(1 - (P if p is None else p), n - 1) * float(
        np.std(differences, ddof=1)
    ) / math.sqrt(n)


def student_t(probability: float, degrees: int) -> float:
    """Return the quantile of Student's t distribution, for 5 or more degrees of freedom.

    Fisher and Cornish's expansion (Abramowitz and Stegun 26.7.5): at 0.99 within 0.002 of the
    exact value for 5 degrees of freedom, within 0.0003 for 7 or more.
    """
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / degrees**k for k, term in enumerate(terms, 1))
