"""Starts for a descent: ramps of log lambda from 0 to `log s`, with different ends.

YaRN leaves the pairs alone that turn more than 32 times in the original window, rescales by `s`
those that turn less than once, and ramps (in 1 / lambda) between. Where a ramp should lie depends
on the model: on the packaged one, narrow ramps around 0.7 turns are far better.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

import numpy as np

from longrope.factor_search.problem import Problem
from longrope.factor_search.space import Candidate
from longrope.factors.rules import pair_that_turns

#: Turns in the original window at the middle of the ramp (YaRN: 5.7), half an octave apart: the
#: loss can double within an octave.
CENTRES = tuple(2 ** (k / 2) for k in range(4, -4, -1))
#: Turns at the start of the ramp divided by those at its end (YaRN: 32).
WIDTHS = (1.2, 3, 8)
#: The family: `(centre, width)` of each.
SHAPES = tuple((centre, width) for centre in CENTRES for width in WIDTHS)


def ramp(problem: Problem, centre: float, width: float) -> Candidate:
    """Return the ramp from `centre * sqrt(width)` turns down to `centre / sqrt(width)` turns."""
    rope = (problem.original_length, problem.rope_theta, problem.rotary_dim)
    first = pair_that_turns(centre * math.sqrt(width), *rope)
    last = pair_that_turns(centre / math.sqrt(width), *rope)
    share = np.clip((np.arange(problem.space.dims) - first) / (last - first), 0, 1)
    return problem.space.snap(problem.ratio**share)


def ramps(problem: Problem) -> list[Candidate]:
    """Return the candidates of the family, each once, without those that rescale nothing.

    In a ladder above a tier that has been searched, those of the shapes that were best there, with
    the attention factor that it leads to.
    """
    shapes = SHAPES if problem.shapes is None else problem.shapes
    family = dict.fromkeys(ramp(problem, centre, width) for centre, width in shapes)
    factor = problem.attention_from_below
    return [
        dataclasses.replace(c, attention_factor=factor)
        for c in family
        if c.hundredths[-1] > problem.space.lower
    ]


def best_shapes(
    problem: Problem, losses: Mapping[Candidate, float], count: int
) -> tuple[tuple[float, float], ...]:
    """Return the shapes of the `count` best ramps of a problem, of those that have a loss."""
    known = {s: losses[c] for s in SHAPES if (c := ramp(problem, *s)) in losses}
    return tuple(sorted(known, key=known.__getitem__)[:count])
