"""Starts for a descent: ramps of log lambda from 0 to `log s`, with different ends.

YaRN leaves the pairs alone that turn more than 32 times in the original window, rescales by `s`
those that turn less than once, and ramps (in 1 / lambda) between. Where a ramp should lie depends
on the model: on the packaged one, narrow ramps around 0.7 turns are far better.
"""

from __future__ import annotations

import math

import numpy as np

from longrope.factor_search.problem import Problem
from longrope.factor_search.space import Candidate
from longrope.factors.rules import pair_that_turns

#: Turns in the original window at the middle of the ramp (YaRN: 5.7), half an octave apart: the
#: loss can double within an octave.
CENTRES = tuple(2 ** (k / 2) for k in range(4, -4, -1))
#: Turns at the start of the ramp divided by those at its end (YaRN: 32).
WIDTHS = (1.2, 3, 8)


def ramp(problem: Problem, centre: float, width: float) -> Candidate:
    """Return the ramp from `centre * sqrt(width)` turns down to `centre / sqrt(width)` turns."""
    rope = (problem.original_length, problem.rope_theta, problem.rotary_dim)
    first = pair_that_turns(centre * math.sqrt(width), *rope)
    last = pair_that_turns(centre / math.sqrt(width), *rope)
    share = np.clip((np.arange(problem.space.dims) - first) / (last - first), 0, 1)
    return problem.space.snap(problem.ratio**share)


def ramps(problem: Problem) -> list[Candidate]:
    """Return the candidates of the family, each once, without those that rescale nothing."""
    family = dict.fromkeys(ramp(problem, centre, width) for centre in CENTRES for width in WIDTHS)
    return [c for c in family if c.hundredths[-1] > problem.space.lower]
