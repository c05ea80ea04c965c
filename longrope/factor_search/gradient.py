"""Descent on the rescale factors: Adam on log lambda, kept monotone and bounded by projection.

Everything here is float64 numpy on a few hundred numbers. The model is behind one function that
returns the loss and its gradient at a point, so a descent is a deterministic function of what
that function returned.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from longrope import _validation

#: Adam's decay rates of the two moments; its usual ones, the second shortened to these few steps.
BETAS = (0.9, 0.98)
#: Adam's epsilon for gradients of norm 1: a pair that moves the loss less than this share of the
#: whole gradient takes proportionally smaller steps. The slowest pairs hardly matter, and with the
#: usual 1e-8 they take steps as large as those of the others, towards wherever noise sends them.
EPSILON = 0.02
#: Learning rate of the log of the attention factor over that of the lambdas: it acts on every
#: pair at once.
ATTENTION_RATE = 1 / 3
#: The attention factor stays within this ratio of where it began.
ATTENTION_REACH = 1.5


@dataclass(frozen=True)
class Point:
    """Factors off the grid: log lambda `[dims]` and the attention factor."""

    log_lambdas: np.ndarray
    attention_factor: float

    @property
    def lambdas(self) -> np.ndarray:
        """The rescale factors, `[dims]`."""
        return np.exp(self.log_lambdas)


#: Returns the loss at a point in a step, and its gradient `[dims + 1]` with respect to log lambda
#: and, last, to the log of the attention factor.
LossAndGradient = Callable[[Point, int], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class DescentSettings:
    """How far and how fast to descend."""

    steps: int = 80
    learning_rate: float = 0.05
    windows_per_step: int = 1
    checkpoints: int = 5

    def __post_init__(self):
        for name in ("steps", "windows_per_step", "checkpoints"):
            _validation.integer(name, getattr(self, name), 1)
        _validation.positive("learning_rate", self.learning_rate)

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a half cosine that ends near 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    @property
    def checkpoint_steps(self) -> list[int]:
        """The numbers of steps after which a point is set aside, evenly spread, the last one in."""
        spread = np.linspace(0, self.steps, self.checkpoints + 1)[1:]
        return sorted({max(1, round(step)) for step in spread})


def isotonic(values: np.ndarray) -> np.ndarray:
    """Return the non-decreasing sequence nearest to `values` in least squares, float64 `[n]`.

    Pool adjacent violators: neighbours in the wrong order are replaced by their mean, again and
    again. O(n).
    """
    means: list[float] = []
    counts: list[int] = []
    for value in values:
        mean, count = float(value), 1
        while means and means[-1] > mean:
            count += counts[-1]
            mean += (means.pop() - mean) * counts.pop() / count
        means.append(mean)
        counts.append(count)
    return np.repeat(means, counts)


def descend(
    start: Point,
    max_lambda: float,
    loss_and_gradient: LossAndGradient,
    settings: DescentSettings,
    learn_attention: bool = False,
) -> list[tuple[int, Point]]:
    """Run a descent and return points set aside on the way, `(steps made, point)`.

    At each of `settings.checkpoint_steps` that point is the mean of the later half of the
    iterates so far, which evens out the noise of the windows. Lambdas are non-decreasing and within
    `[1, max_lambda]`: after each step they are projected onto these constraints (the isotonic
    regression, clipped, is the nearest such point in log lambda).
    """
    dims = len(start.log_lambdas)
    origin = math.log(start.attention_factor)
    x = np.append(start.log_lambdas, origin)
    rates = np.append(np.ones(dims), ATTENTION_RATE)
    free = np.append(np.ones(dims), float(learn_attention))
    first, second = np.zeros(dims + 1), np.zeros(dims + 1)
    iterates, kept = [], []
    for step in range(settings.steps):
        _, gradient = loss_and_gradient(Point(x[:dims], math.exp(x[dims])), step)
        gradient = gradient * free
        gradient = gradient / max(float(np.linalg.norm(gradient)), 1e-30)
        first = BETAS[0] * first + (1 - BETAS[0]) * gradient
        second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
        mean = first / (1 - BETAS[0] ** (step + 1))
        spread = np.sqrt(second / (1 - BETAS[1] ** (step + 1)))
        x = x - settings.rate(step) * rates * mean / (spread + EPSILON)
        x[:dims] = np.clip(isotonic(x[:dims]), 0, math.log(max_lambda))
        reach = math.log(ATTENTION_REACH)
        x[dims] = np.clip(x[dims], origin - reach, origin + reach)
        iterates.append(x)
        if step + 1 in settings.checkpoint_steps:
            mean = np.mean(iterates[len(iterates) // 2 :], axis=0)
            kept.append((step + 1, Point(mean[:dims], math.exp(mean[dims]))))
    return kept
