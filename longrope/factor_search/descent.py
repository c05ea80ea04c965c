"""Descent on the rescale factors: Adam on log lambda, kept monotone and bounded by projection.

A change of log lambda by x turns the phase of a pair at the end of the original window by x times
the turns that the pair makes there: 40 for the first pair in a window of 256, 1300 in one of 8192.
So the pairs are given scales, one over their turns where these are more than 1, and the descent
works in units of them: a step moves every pair's phase by about as much.

Everything here is float64 numpy on a few hundred numbers. The model is behind one function that
returns the loss and its gradient at a point, so a descent is a deterministic function of what
that function returned.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from longrope._validation import count, positive
from longrope.runs.options import Options, about

#: Adam's decay rates of the two moments: the usual ones, but the second is shorter, for few steps.
BETAS = (0.9, 0.98)
#: Adam's epsilon for gradients of norm 1: a pair that moves the loss less than this share of the
#: whole gradient takes proportionally smaller steps. The slowest pairs hardly matter, and with the
#: usual 1e-8 they take steps as large as those of the others, towards wherever noise sends them.
EPSILON = 0.02
#: Unit of the log of the attention factor: it acts on every pair at once.
ATTENTION_SCALE = 1 / 3
#: The attention factor stays within this ratio of its start.
ATTENTION_REACH = 1.5
#: After a worse point a descent continues with this share of its learning rate.
SLOWER = 0.3


@dataclass(frozen=True)
class Point:
    """Factors off the grid: log lambda `[dims]` and the attention factor.

    By layer and head `[L, Hk, dims]` and `[L, Hk]`.
    """

    log_lambdas: np.ndarray
    attention_factor: float | np.ndarray

    @property
    def lambdas(self) -> np.ndarray:
        """The rescale factors, in the shape of `log_lambdas`."""
        return np.exp(self.log_lambdas)


T = TypeVar("T")
#: Returns the loss at a point in a step, and its gradient with respect to log lambda and, last, to
#: the log of the attention factor: `[dims + 1]`, or flat where there are those of heads.
LossAndGradient = Callable[[Point, int], tuple[float, np.ndarray]]


@dataclass(frozen=True)
class DescentSettings(Options):
    """How far and how fast to descend."""

    steps: int = field(default=80, metadata=about(count))
    learning_rate: float = field(default=0.05, metadata=about(positive))
    windows_per_step: int = field(default=1, metadata=about(count))
    checkpoints: int = field(default=5, metadata=about(count))

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a half cosine that ends near 0."""
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    @property
    def segments(self) -> list[range]:
        """The numbers of the steps between points at which the descent is judged."""
        ends = np.linspace(0, self.steps, min(self.checkpoints, self.steps) + 1).round().astype(int)
        return [range(a, b) for a, b in itertools.pairwise(ends.tolist())]


def isotonic(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the non-decreasing sequence nearest to `values` in weighted squares, float64 `[n]`.

    Pool adjacent violators: neighbours in the wrong order are replaced by their weighted mean
    until there are none. O(n).
    """
    means: list[float] = []
    masses: list[float] = []
    counts: list[int] = []
    for value, weight in zip(values, weights, strict=True):
        mean, mass, count = float(value), float(weight), 1
        while means and means[-1] > mean:
            mass += masses[-1]
            mean += (means.pop() - mean) * masses.pop() / mass
            count += counts.pop()
        means.append(mean)
        masses.append(mass)
        counts.append(count)
    return np.repeat(means, counts)


class Descent:
    """Adam with projection.

    Parameters
    ----------
    scales
        `[dims]`: the units of log lambda, explained at the top of this file.
    max_lambda, min_lambda
        Lambdas stay within `[min_lambda, max_lambda]`.
    settings
        How far and how fast to descend.
    attention_factor
        The start of the attention factor.
    learn_attention
        Whether it moves.
    """

    def __init__(
        self,
        scales: np.ndarray,
        max_lambda: float,
        settings: DescentSettings,
        attention_factor: float,
        learn_attention: bool = False,
        min_lambda: float = 1.0,
    ):
        self.settings = settings
        self._lower, self._upper = math.log(min_lambda), math.log(max_lambda)
        self._origin = math.log(attention_factor)
        self._scales = np.append(scales, ATTENTION_SCALE)
        self._free = np.append(np.ones(len(scales)), float(learn_attention))

    def run(
        self,
        start: Point,
        loss_and_gradient: LossAndGradient,
        steps: range,
        slow: float = 1.0,
    ) -> Point:
        """Take steps from a point, and return the mean of the later half of the iterates.

        `steps` are the numbers of the steps, which decide the learning rate; `slow` multiplies it.
        The mean evens out the noise of the windows.
        """
        return self._run(start, loss_and_gradient, steps, slow, [range(len(steps))])[0]

    def halting(
        self,
        start: Point,
        loss_and_gradient: LossAndGradient,
        rounded: Callable[[Point], T],
        loss_of: Callable[[T, int], float],
        least: float,
    ) -> list[tuple[T, float]]:
        """Take all steps from a point; go back, and on more slowly, from a point that is worse.

        A segment ends with a point, of which `rounded` makes what `loss_of` measures, told how many
        steps there were; `least` is the loss of the start. Returns what was better than all before
        it, in order, with its loss.
        """
        best, slow, better = start, 1.0, []
        for steps in self.settings.segments:
            point = self.run(best, loss_and_gradient, steps, slow)
            made = rounded(point)
            loss = loss_of(made, steps.stop)
            if loss < least:
                best, least = point, loss
                better.append((made, loss))
            else:
                slow *= SLOWER
        return better

    def averages(
        self, start: Point, loss_and_gradient: LossAndGradient, speed: float = 1.0
    ) -> list[Point]:
        """Take all steps from a point, and return the mean of each segment as `run` does.

        `speed` multiplies the learning rate.
        """
        steps = range(self.settings.steps)
        return self._run(start, loss_and_gradient, steps, speed, self.settings.segments)

    def _run(
        self,
        start: Point,
        loss_and_gradient: LossAndGradient,
        steps: range,
        slow: float,
        segments: list[range],
    ) -> list[Point]:
        """Take steps, and return the mean of the later half of each segment's iterates.

        After each step the lambdas are projected onto the non-decreasing ones within the bounds:
        the isotonic regression, clipped, is the nearest point of that kind. Nearest in the metric
        of Adam's step: only there pairs that are held together settle where their gradients cancel
        (in units of the scales alone, where as many pull up as down, however hard they pull).
        """
        x = self._numbers(start)
        first, second = np.zeros(x.shape), np.zeros(x.shape)
        iterates = []
        for taken, step in enumerate(steps, 1):
            _, gradient = loss_and_gradient(self._point(x), step)
            gradient = self._by_number(gradient, x) * self._free * self._scales
            gradient = gradient / max(float(np.linalg.norm(gradient)), 1e-30) * self._norm(x)
            first = BETAS[0] * first + (1 - BETAS[0]) * gradient
            second = BETAS[1] * second + (1 - BETAS[1]) * gradient**2
            mean = first / (1 - BETAS[0] ** taken)
            spread = np.sqrt(second / (1 - BETAS[1] ** taken)) + EPSILON
            rate = slow * self.settings.rate(step)
            x = self._projected(x - rate * self._scales * mean / spread, spread)
            iterates.append(x)
        later = [iterates[s.start : s.stop][len(s) // 2 :] for s in segments]
        return [self._point(np.mean(each, axis=0)) for each in later]

    def _numbers(self, point: Point) -> np.ndarray:
        return np.append(point.log_lambdas, math.log(point.attention_factor))

    def _point(self, x: np.ndarray) -> Point:
        return Point(x[:-1], math.exp(x[-1]))

    def _by_number(self, gradient: np.ndarray, x: np.ndarray) -> np.ndarray:
        return gradient

    def _norm(self, x: np.ndarray) -> float:
        return 1.0

    def _projected(self, x: np.ndarray, spread: np.ndarray) -> np.ndarray:
        log_lambdas = isotonic(x[:-1], spread[:-1] * self._scales[:-1] ** -2)
        reach = math.log(ATTENTION_REACH)
        factor = np.clip(x[-1], self._origin - reach, self._origin + reach)
        return np.append(np.clip(log_lambdas, self._lower, self._upper), factor)


class HeadDescent(Descent):
    """The same for all layers and heads at once, each projected for itself: `[L, Hk, dims + 1]`.

    The gradient of the mean head has norm 1 then, as that of the one set of a `Descent`.
    """

    def _numbers(self, point: Point) -> np.ndarray:
        factors = np.log(point.attention_factor)[..., None]
        x = np.concatenate([point.log_lambdas, factors], -1)
        return self._projected(x, np.ones(x.shape))

    def _point(self, x: np.ndarray) -> Point:
        return Point(x[..., :-1], np.exp(x[..., -1]))

    def _by_number(self, gradient: np.ndarray, x: np.ndarray) -> np.ndarray:
        # All lambdas first, then all attention factors.
        heads = x.size // x.shape[-1]
        lambdas, factors = gradient[:-heads], gradient[-heads:, None]
        return np.concatenate([lambdas.reshape(heads, -1), factors], -1).reshape(x.shape)

    def _norm(self, x: np.ndarray) -> float:
        return math.sqrt(x.size / x.shape[-1])

    def _projected(self, x: np.ndarray, spread: np.ndarray) -> np.ndarray:
        flat = (each.reshape(-1, x.shape[-1]) for each in (x, spread))
        rows = [super(HeadDescent, self)._projected(*row) for row in zip(*flat, strict=True)]
        return np.stack(rows).reshape(x.shape)
