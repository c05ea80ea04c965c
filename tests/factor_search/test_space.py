"""The search space: every move is monotone and within the bounds by construction."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longrope.factor_search.space import START_TOKENS, Candidate, SearchSpace


@st.composite
def spaces(draw):
    lower = draw(st.integers(1, 200))
    upper = lower + draw(st.integers(0, 900))
    choices = draw(st.lists(st.sampled_from(START_TOKENS), min_size=1, unique=True))
    return SearchSpace(draw(st.integers(1, 40)), upper, tuple(choices), lower)


@st.composite
def candidates(draw, space):
    values = draw(
        st.lists(st.integers(space.lower, space.upper), min_size=space.dims, max_size=space.dims)
    )
    return Candidate(tuple(sorted(values)), draw(st.sampled_from(space.start_tokens)))


def random_of(seed):
    return np.random.default_rng(seed)


@given(st.data(), st.floats(0.01, 1.0), st.integers(0, 2**32))
def test_mutations_stay_in_the_space(data, probability, seed):
    space = data.draw(spaces())
    parent = data.draw(candidates(space))
    assert parent in space
    assert space.mutate(parent, probability, random_of(seed)) in space


@given(st.data(), st.integers(0, 2**32))
def test_crossovers_stay_in_the_space_and_between_the_parents(data, seed):
    space = data.draw(spaces())
    a, b = data.draw(candidates(space)), data.draw(candidates(space))
    child = space.crossover(a, b, random_of(seed))
    assert child in space
    for value, x, y in zip(child.hundredths, a.hundredths, b.hundredths, strict=True):
        assert min(x, y) <= value <= max(x, y)
    assert set(child.hundredths) <= set(a.hundredths) | set(b.hundredths)
    assert child.start_tokens in (a.start_tokens, b.start_tokens)


@given(st.data(), st.lists(st.floats(0.01, 50), min_size=1, max_size=40))
def test_snapping_rounds_clips_and_orders(data, lambdas):
    space = SearchSpace(len(lambdas), upper=1000)
    snapped = space.snap(lambdas)
    assert snapped in space
    if lambdas == sorted(lambdas) and lambdas[0] >= 1 and lambdas[-1] <= 10:
        assert np.abs(np.array(snapped.lambdas) - lambdas).max() <= 0.005 + 1e-12


def test_the_grid_is_exact():
    space = SearchSpace.of(3, max_lambda=1.25 * 8)
    assert (space.lower, space.upper) == (100, 1000)
    assert SearchSpace.of(3, max_lambda=1.25 * 2.2).upper == 275  # 2.75 - 1 ulp in floats
    candidate = space.snap([1.0, 2.154, 8.0])
    assert candidate == Candidate((100, 215, 800), 0)
    assert candidate.lambdas == (1.0, 2.15, 8.0)
    assert Candidate((100, 215, 801)) not in space.__class__(3, 800)
    assert Candidate((100, 99, 800)) not in space
    assert Candidate((100, 800)) not in space
    assert Candidate((100, 215, 800), 3) not in space


def test_mutation_probability_is_the_share_of_redrawn_factors():
    space = SearchSpace(dims=19, upper=1_000_000, lower=1)  # bounds: the neighbours
    parent = Candidate(tuple(range(1000, 20_000, 1000)), 16)
    random = random_of(0)
    children = [space.mutate(parent, 0.3, random) for _ in range(400)]
    changed = np.mean([np.array(c.hundredths) != parent.hundredths for c in children])
    assert changed == pytest.approx(0.3, abs=0.03)
    kept = np.mean([c.start_tokens == 16 for c in children])
    assert kept == pytest.approx(0.7 + 0.3 / len(START_TOKENS), abs=0.06)
    assert {c.start_tokens for c in children} == set(START_TOKENS)
    assert len(set(children)) == 400


def test_a_redrawn_factor_stays_within_reach_and_the_others_make_way():
    space = SearchSpace(dims=30, upper=4000)  # bounds up to 3 pairs away
    parent = Candidate(tuple(range(100, 3100, 100)))
    random = random_of(0)
    distances = set()
    for _ in range(2000):
        child = space.mutate(parent, 0.01, random).hundredths
        changed = np.flatnonzero(np.array(child) != parent.hundredths)
        new = set(child) - set(parent.hundredths)
        if len(new) == 1 and changed.min() > 4 and changed.max() < 25:  # one draw, not at an end
            (value,) = new
            assert all(child[j] == value for j in changed)
            assert changed.max() - changed.min() == len(changed) - 1 < 3
            distances.add(len(changed))
    assert distances == {1, 2, 3}


def test_a_plateau_changes_further_in_than_its_ends():
    space = SearchSpace(dims=32, upper=1000)
    flat = space.snap([8.0] * 32)
    random = random_of(0)
    moved = np.mean(
        [np.array(space.mutate(flat, 0.3, random).hundredths) != 800 for _ in range(500)], axis=0
    )
    assert moved[[0, -1]].min() > 0.3
    assert moved[[2, -3]].min() > 0.1


def test_repeated_mutation_moves_every_factor_far():
    """Also from a flat start such as PI, where neighbours leave a factor no room at first."""
    space = SearchSpace(dims=8, upper=1000)
    candidate = space.snap([8.0] * 8)
    random = random_of(0)
    seen = []
    for _ in range(2000):
        candidate = space.mutate(candidate, 0.3, random)
        seen.append(candidate.hundredths)
    low, high = np.min(seen, 0), np.max(seen, 0)
    assert (high - low > 300).all()
    assert low[0] < 110
    assert high[-1] > 990


def test_crossover_takes_from_both_parents():
    space = SearchSpace(dims=64, upper=10_000)
    a = Candidate(tuple(range(100, 6500, 100)), 0)
    b = Candidate(tuple(v + 50 for v in a.hundredths), 256)
    random = random_of(0)
    children = [space.crossover(a, b, random) for _ in range(200)]
    from_a = np.mean([np.array(c.hundredths) == a.hundredths for c in children])
    assert from_a == pytest.approx(0.5, abs=0.03)
    assert {c.start_tokens for c in children} == {0, 256}
