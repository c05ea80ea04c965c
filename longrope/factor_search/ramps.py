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

#: Turns in the original window at the middle of the ramp (YaRN: 5.7), half an octave apart: the
#: loss can double within an octave.
CENTRES = tuple(2 ** (k / 2) for k in range(4, -4, -1))
#: Turns at the begin of the ramp over those at its end (YaRN: 32).
WIDTHS = (1.2, 3, 8)


def ramp(problem: Problem, centre: float, width: float) -> Candidate:
    """Return the ramp from `centre * sqrt(width)` turns down to `centre / sqrt(width)` turns."""
    begin, end = (
        _pair(problem, centre * math.sqrt(width)),
        _pair(problem, centre / math.sqrt(width)),
    )
    share = np.clip((np.arange(problem.space.dims) - begin) / (end - begin), 0, 1)
    ratio = problem.target_length / problem.original_length
    return problem.space.snap(ratio**share)


def ramps(problem: Problem) -> list[Candidate]:
    """Return the family, each of its candidates once, those that rescale nothing left out."""
    family = dict.fromkeys(ramp(problem, centre, width) for centre in CENTRES for width in WIDTHS)
    return [c for c in family if c.hundredths[-1] > problem.space.lower]


def _pair(problem: Problem, turns: float) -> float:
    """Return the (fractional) pair that turns so often in the original window."""
    wavelength = problem.original_length / (turns * 2 * math.pi)
    return problem.rotary_dim * math.log(wavelength) / (2 * math.log(problem.rope_theta))
