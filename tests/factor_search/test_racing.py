"""Racing on constructed losses: who is dropped, and what the others get."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longrope.factor_search.evolution import EvolutionSettings, Proposal, evolve
from longrope.factor_search.racing import BLOCKS, Race, Stage, clearly_worse, stages, student_t
from longrope.factor_search.space import Candidate, SearchSpace

WINDOWS = 5


def proposals_of(count, origin="mutation", iteration=0):
    return [Proposal(Candidate((100 * iteration + i,)), origin, iteration) for i in range(count)]


class Losses:
    """What a race measures: block sums `[WINDOWS, BLOCKS]` that are known beforehand."""

    def __init__(self, sums):
        self.sums = sums
        self.block_sums = {}
        self.measured = []

    def __call__(self, proposals, stage):
        for p in proposals:
            known = self.block_sums.get(p.candidate)
            assert stage.start == (0 if known is None else len(known))
            self.block_sums[p.candidate] = self.sums[p.candidate][: stage.end]
            self.measured.append((p.candidate, stage))
        return [self.block_sums[p.candidate].sum() for p in proposals]

    def race(self, parents):
        return Race(self, self.block_sums, WINDOWS, parents)

    def windows(self, candidate):
        return sum(stage.end - stage.start for c, stage in self.measured if c == candidate)


def noisy(proposals, levels, noise, random):
    shape = (WINDOWS, BLOCKS)
    common = random.normal(size=shape)  # some blocks are harder for all, as in text
    return {
        p.candidate: level + common + noise * random.normal(size=shape)
        for p, level in zip(proposals, levels, strict=True)
    }


# --- the test ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("probability", "degrees", "expected"),  # Student's table
    [
        (0.99, 5, 3.3649),
        (0.99, 7, 2.9980),
        (0.99, 23, 2.4999),
        (0.99, 60, 2.3901),
        (0.95, 7, 1.8946),
        (0.5, 7, 0.0),
    ],
)
def test_quantiles_of_student_t(probability, degrees, expected):
    assert student_t(probability, degrees) == pytest.approx(expected, abs=2e-3)


@settings(deadline=None)
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=50), st.floats(1e-9, 0.5))
def test_what_is_at_least_as_good_is_never_clearly_worse(differences, p):
    differences = np.array(differences)
    if differences.sum() > 0:
        differences = -differences
    assert not clearly_worse(differences, p)


def test_clearly_worse_is_a_one_sided_test_of_the_mean():
    assert clearly_worse(np.full(8, 1e-3))
    assert not clearly_worse(np.full(5, 1e-3))  # too few to say
    random = np.random.default_rng(0)
    draws = random.normal(size=(4000, 24))
    assert np.mean([clearly_worse(d, 0.05) for d in draws]) == pytest.approx(0.05, abs=0.01)
    assert np.mean([clearly_worse(d + 1) for d in draws[:500]]) > 0.95
    assert not any(clearly_worse(d - 1) for d in draws[:500])


@pytest.mark.parametrize(
    ("windows", "ends"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (5, [1, 2, 4, 5]), (8, [1, 2, 4, 8])],
)
def test_stages_cover_the_windows_once(windows, ends):
    found = stages(windows)
    assert [stage.end for stage in found] == ends
    assert [stage.start for stage in found] == [0, *ends[:-1]]
    assert [stage.role for stage in found] == ["race"] * (len(ends) - 1) + ["search"]


# --- who is dropped ---------------------------------------------------------------------------


def test_without_noise_exactly_those_below_the_cut_are_dropped_at_once():
    proposals = proposals_of(20)
    levels = np.random.default_rng(0).permutation(20)
    losses = Losses(noisy(proposals, levels, 0, np.random.default_rng(1)))
    result = losses.race(parents=6)(proposals)
    for p, level, loss in zip(proposals, levels, result, strict=True):
        assert loss == (losses.sums[p.candidate].sum() if level < 6 else math.inf)
        assert losses.windows(p.candidate) == (WINDOWS if level < 6 else 1)


@settings(deadline=None)
@given(
    st.integers(1, 30), st.integers(1, 12), st.floats(0, 3), st.floats(0, 1), st.integers(0, 999)
)
def test_only_who_loses_the_test_against_the_cut_is_dropped(count, parents, noise, spread, seed):
    random = np.random.default_rng(seed)
    proposals = proposals_of(count)
    losses = Losses(noisy(proposals, spread * random.random(count), noise, random))
    result = losses.race(parents)(proposals)
    running = [p.candidate for p in proposals]
    for stage in stages(WINDOWS)[:-1]:
        so_far = {c: losses.sums[c][: stage.end] for c in running}
        cut = sorted(so_far.values(), key=np.sum)[min(parents, count) - 1]
        worse = {c for c in running if clearly_worse((so_far[c] - cut).ravel())}
        if count >= parents:
            running = [c for c in running if c not in worse]
    finished = {p.candidate for p, loss in zip(proposals, result, strict=True) if loss < math.inf}
    assert finished == set(running)
    assert len(finished) >= min(parents, count)
    assert all(
        loss == losses.sums[p.candidate].sum()
        for p, loss in zip(proposals, result, strict=True)
        if p.candidate in finished
    )


def test_later_generations_race_against_the_parents():
    losses = Losses({})
    race = losses.race(parents=4)
    random = np.random.default_rng(0)
    first, second, third = (proposals_of(8, iteration=i) for i in range(3))
    losses.sums |= noisy(first, range(8), 0, random)
    common = losses.sums[first[0].candidate]
    losses.sums |= {p.candidate: common + 3.5 + i for i, p in enumerate(second)}
    losses.sums |= {p.candidate: common + 2.5 - i for i, p in enumerate(third)}
    race(first)
    assert race(second) == [math.inf] * 8
    result = race(third)
    # Of both generations the best four are 2.5 - 7 ... 2.5 - 4.
    assert [loss < math.inf for loss in result] == [False] * 4 + [True] * 4
    assert {losses.windows(p.candidate) for p in second} == {1}


def test_too_few_members_for_a_cut_drop_nobody():
    proposals = proposals_of(5)
    losses = Losses(noisy(proposals, range(5), 0, np.random.default_rng(0)))
    assert all(loss < math.inf for loss in losses.race(parents=6)(proposals))


def test_baselines_are_never_dropped():
    proposals = [*proposals_of(8), Proposal(Candidate((999,)), "yarn", 0)]
    losses = Losses(noisy(proposals, [*range(8), 100], 0, np.random.default_rng(0)))
    result = losses.race(parents=2)(proposals)
    assert result[-1] == losses.sums[Candidate((999,))].sum()
    assert result.count(math.inf) == 6


def test_losses_that_are_not_finite_end_at_once():
    proposals = proposals_of(4)
    losses = Losses(noisy(proposals, range(4), 0, np.random.default_rng(0)))
    losses.sums[proposals[0].candidate] = np.full((WINDOWS, BLOCKS), math.inf)
    result = losses.race(parents=2)(proposals)
    assert [loss < math.inf for loss in result] == [False, True, True, False]
    assert losses.windows(proposals[0].candidate) == 1


@pytest.mark.parametrize("seed", range(3))
def test_an_evolution_without_noise_is_the_same_for_fewer_measurements(seed):
    """Where the first window tells the whole truth, racing changes the cost alone."""
    space = SearchSpace(dims=12, upper=1000)
    seeds = {"pi": space.snap([8.0] * 12), "ntk": space.snap(8.0 ** (np.arange(12) / 11))}
    target = np.linspace(1, 9, 12) * 100
    sizes = EvolutionSettings(population=16, mutations=8, crossovers=8, iterations=6, parents=8)
    common = np.random.default_rng(0).normal(size=(WINDOWS, BLOCKS))

    def sums(candidate):
        return common + np.square(np.log(np.array(candidate.hundredths) / target)).sum()

    def run(evaluate):
        return evolve(space, seeds, evaluate, sizes, np.random.default_rng(seed))

    plain = []

    def measure_all(proposals):
        plain.extend(proposals)
        return [sums(p.candidate).sum() for p in proposals]

    losses = Losses({})
    race = losses.race(sizes.parents)

    def measure_raced(proposals):
        losses.sums |= {p.candidate: sums(p.candidate) for p in proposals}
        return race(proposals)

    assert run(measure_raced) == run(measure_all)
    cost = sum(stage.end - stage.start for _, stage in losses.measured)
    assert cost < 0.8 * WINDOWS * len(plain)
    assert {c for c, stage in losses.measured if stage == Stage(0, 1, "race")} == set(losses.sums)
