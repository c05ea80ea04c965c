"""The descent on losses whose optimum is known: projection, bounds, averaging."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.factor_search.descent import (
    ATTENTION_REACH,
    Descent,
    DescentSettings,
    Point,
    isotonic,
)

numbers = st.floats(-5, 5)


WEIGHTS = np.geomspace(100, 1, 20)


@given(st.lists(numbers, min_size=1, max_size=20), st.lists(numbers, min_size=20, max_size=20))
def test_isotonic_is_the_nearest_non_decreasing_sequence(values, other):
    values, weights = np.array(values), WEIGHTS[: len(values)]
    projected = isotonic(values, weights)
    assert (np.diff(projected) >= 0).all()
    assert weights @ projected == pytest.approx(weights @ values, abs=1e-7)
    # The projection onto a convex set: no other member lies on the near side of it.
    other = np.sort(other[: len(values)])
    assert ((values - projected) * weights) @ (other - projected) <= 1e-7


def test_isotonic_leaves_what_is_in_order():
    values = np.array([0.0, 0.0, 1.0, 1.5])
    assert (isotonic(values, WEIGHTS[:4]) == values).all()


def bowl(optimum, noise=0.0, attention=0.0):
    """A quadratic loss around `optimum` in log lambda, with noise in the gradient."""
    random = np.random.default_rng(0)

    def loss_and_gradient(point, step):
        away = np.append(point.log_lambdas - optimum, math.log(point.attention_factor) - attention)
        return away @ away, 2 * away + noise * random.standard_normal(len(away))

    return loss_and_gradient


START = Point(np.full(16, math.log(4.0)), 1.2)


def last(settings, loss, start=START, scales=None, learn_attention=False):
    scales = np.ones(16) if scales is None else scales
    descent = Descent(scales, 10.0, settings, start.attention_factor, learn_attention)
    return descent.run(start, loss, range(settings.steps))


def test_the_descent_ends_at_the_optimum():
    optimum = np.linspace(0.2, 2, 16)
    point = last(DescentSettings(steps=200), bowl(optimum))
    assert point.log_lambdas == pytest.approx(optimum, abs=0.05)
    assert point.attention_factor == pytest.approx(1.2)


def test_an_optimum_out_of_order_or_out_of_bounds_is_projected():
    optimum = np.linspace(2, 0.2, 16)
    point = last(DescentSettings(steps=200), bowl(optimum))
    assert point.log_lambdas == pytest.approx(np.full(16, optimum.mean()), abs=0.05)
    point = last(DescentSettings(steps=200), bowl(np.linspace(-2, 6, 16)))
    assert (np.diff(point.log_lambdas) >= 0).all()
    assert point.lambdas[0] == 1
    assert point.lambdas[-1] == pytest.approx(10)
    assert point.lambdas.max() <= 10 * (1 + 1e-12)


def test_pairs_that_do_not_matter_stay_where_noise_would_send_them_away():
    random = np.random.default_rng(1)

    def loss_and_gradient(point, step):
        gradient = np.append(point.log_lambdas - 1.0, 0.0) + random.standard_normal(17)
        gradient[10:] = 1e-3 * random.standard_normal(7)
        return 0.0, gradient

    point = last(DescentSettings(steps=100, learning_rate=0.1), loss_and_gradient)
    assert point.lambdas[10:16] == pytest.approx(np.full(6, 4.0), rel=0.1)


def test_the_mean_of_iterates_is_less_noisy_than_the_last():
    optimum = np.linspace(0.2, 2, 16)
    seen = []
    noisy = bowl(optimum, noise=2)

    def loss_and_gradient(point, step):
        seen.append(point.log_lambdas)
        return noisy(point, step)

    # Half of the steps: the rate is still high.
    descent = Descent(np.ones(16), 10.0, DescentSettings(steps=400), 1.0)
    point = descent.run(Point(optimum, 1.0), loss_and_gradient, range(200))
    late = [np.linalg.norm(seen[step] - optimum) for step in range(100, 200)]
    assert np.linalg.norm(point.log_lambdas - optimum) < 0.8 * np.mean(late)


def test_the_averages_of_segments_are_those_of_one_descent():
    """The moments go on: the points are those of a descent without checkpoints."""
    settings, optimum = DescentSettings(steps=40, checkpoints=5), np.linspace(0.2, 2, 16)
    seen = []

    def loss_and_gradient(point, step):
        seen.append(point.log_lambdas)
        return bowl(optimum)(point, step)

    descent = Descent(np.ones(16), 10.0, settings, 1.2)
    points = descent.averages(START, loss_and_gradient)
    assert len(points) == 5 and len(seen) == 40
    for number, point in enumerate(points[:-1], 1):  # what a step has led to is seen by the next
        later = np.mean(seen[8 * number - 3 : 8 * number + 1], axis=0)
        assert point.log_lambdas == pytest.approx(later)
    away = [np.linalg.norm(point.log_lambdas - optimum) for point in points]
    assert away == sorted(away, reverse=True)
    once = DescentSettings(steps=1)
    moved = Descent(np.ones(16), 10.0, once, 1.2).averages(START, bowl(optimum))
    assert (moved[0].log_lambdas != START.log_lambdas).all()


def test_pairs_move_in_units_of_their_scales():
    scales = np.geomspace(0.01, 1, 16)
    start = Point(np.linspace(0.5, 2, 16), 1.0)

    def loss_and_gradient(point, step):
        return 0.0, -np.append(1 / scales, 0.0)

    point = last(DescentSettings(steps=1), loss_and_gradient, start, scales)
    moved = (point.log_lambdas - start.log_lambdas) / scales
    assert moved == pytest.approx(np.full(16, moved[0]))
    assert moved[0] > 0.03


def test_a_fast_pair_is_not_pulled_along_by_slow_ones():
    scales = np.array([0.01, 1.0, 1.0])

    def loss_and_gradient(point, step):
        return 0.0, np.array([0.0, 1.0, 1.0, 0.0])

    start = Point(np.ones(3), 1.0)
    point = last(DescentSettings(steps=20), loss_and_gradient, start, scales)
    assert point.log_lambdas == pytest.approx(np.ones(3), abs=1e-2)


def test_the_attention_factor_is_learned_within_its_reach():
    settings = DescentSettings(steps=200)
    target = math.log(1.4)
    learned = last(settings, bowl(START.log_lambdas, attention=target), learn_attention=True)
    assert learned.attention_factor == pytest.approx(1.4, abs=0.02)
    far = last(settings, bowl(START.log_lambdas, attention=5.0), learn_attention=True)
    assert far.attention_factor == pytest.approx(1.2 * ATTENTION_REACH)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_the_scale_of_the_loss_does_not_matter(scale):
    def scaled(point, step):
        loss, gradient = bowl(np.linspace(0.2, 2, 16))(point, step)
        return scale * loss, scale * gradient

    expected = last(DescentSettings(steps=20), bowl(np.linspace(0.2, 2, 16)))
    assert last(DescentSettings(steps=20), scaled).log_lambdas == pytest.approx(
        expected.log_lambdas
    )


def test_a_gradient_of_zero_moves_nothing():
    point = last(DescentSettings(steps=5), lambda point, step: (0.0, np.zeros(17)))
    assert (point.log_lambdas == START.log_lambdas).all()


@pytest.mark.parametrize(
    ("steps", "checkpoints", "ends"),
    [(80, 4, [20, 40, 60, 80]), (3, 5, [1, 2, 3]), (1, 1, [1]), (7, 2, [4, 7])],
)
def test_segments_are_even_and_cover_all_steps(steps, checkpoints, ends):
    segments = DescentSettings(steps=steps, checkpoints=checkpoints).segments
    assert [segment.stop for segment in segments] == ends
    assert [step for segment in segments for step in segment] == list(range(steps))
