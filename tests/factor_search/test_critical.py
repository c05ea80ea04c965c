"""The search space of LongRoPE2: its critical pairs, its moves, and a search in it."""

import json

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from support import tiny_models

import longrope
from longrope.factor_search.critical import CriticalSpace, critical_pair
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.space import START_TOKENS, Candidate
from longrope.patching import RopeSettings

#: L0, theta, R of Phi3-mini and of LLaMA3-8B.
PHI3, LLAMA3 = (2048, 10000.0, 96), (8192, 500000.0, 128)
SMALL = {"target_length": 32, "samples": 2, "critical_dimension": True, "progress": False}
OPTIONS = {
    "evolution": {"population": 10, "mutations": 4, "crossovers": 4, "iterations": 3, "parents": 5},
    "gradient": {"steps": 6},
    "hybrid": {"steps": 6, "population": 8, "mutations": 3, "crossovers": 3, "iterations": 2},
}


def space_of(rope=PHI3, ratio=8.0, max_lambda=None, start_tokens=START_TOKENS):
    length, theta, dim = rope
    return CriticalSpace.of(length, int(ratio * length), theta, dim, max_lambda, start_tokens)


def problem_of(critical_dimension=True, rope=PHI3, ratio=8, **changes):
    length, theta, dim = rope
    arguments = {"target_length": ratio * length, "attention_factor": "yarn"} | changes
    options = SearchOptions(critical_dimension=critical_dimension, **arguments)
    settings = RopeSettings(
        model_type="llama", head_dim=dim, original_length=length, rope_theta=theta, rotary_dim=dim
    )
    return Problem.of(settings, options)


@st.composite
def spaces(draw):
    ratio = draw(st.floats(1.01, 64))
    rope = (draw(st.integers(8, 20000)), draw(st.floats(100, 1e6)), draw(st.integers(2, 40)) * 2)
    choices = draw(st.lists(st.sampled_from(START_TOKENS), min_size=1, unique=True))
    target = int(np.ceil(ratio * rope[0]))
    assume(
        target > rope[0] and critical_pair(*rope, 10) < rope[2] // 2 and critical_pair(*rope) > 0
    )
    return CriticalSpace.of(rope[0], target, rope[1], rope[2], None, choices)


@st.composite
def candidates(draw, space):
    pair = draw(st.integers(space.first, space.last))
    above = draw(
        st.lists(
            st.integers(space.least, space.upper),
            min_size=space.dims - pair,
            max_size=space.dims - pair,
        )
    )
    below = (sorted(above)[0] / 100) ** (np.arange(pair) / pair)
    lambdas = np.append(below, np.array(sorted(above)) / 100)
    like = Candidate((), draw(st.sampled_from(space.start_tokens)), critical_pair=pair)
    return space.snap_like(lambdas, like)


def random_of(seed):
    return np.random.default_rng(seed)


def assert_inside(space, candidate):
    """What the space promises, checked without its own code."""
    lambdas, pair = np.array(candidate.lambdas), candidate.critical_pair
    ratio = space.least / 100
    assert space.first <= pair <= space.last
    assert len(lambdas) == space.dims
    assert (np.diff(lambdas) >= 0).all()
    assert lambdas[pair:].min() >= ratio
    assert lambdas[pair:].max() <= space.upper / 100
    assert np.abs(lambdas[:pair] - lambdas[pair] ** (np.arange(pair) / pair)).max() < 0.005 + 1e-9
    assert all(isinstance(v, int) for v in candidate.hundredths)
    assert candidate.start_tokens in space.start_tokens
    assert candidate in space


# --- critical pairs ---------------------------------------------------------------------------


@pytest.mark.parametrize(("rope", "first", "theoretical"), [(PHI3, 19, 31), (LLAMA3, 24, 35)])
def test_critical_pairs_of_known_models(rope, first, theoretical):
    assert critical_pair(*rope) == theoretical
    space = space_of(rope)
    assert (space.first, space.last) == (first, theoretical)
    # In turns: the first pair at or below 10, and the first at or below 1.
    length, theta, dim = rope
    turns = length * theta ** (-2 * np.arange(dim // 2) / dim) / (2 * np.pi)
    assert turns[first - 1] > 10 >= turns[first]
    assert turns[theoretical - 1] > 1 >= turns[theoretical]


def test_bounds_of_lambda():
    space = space_of(ratio=8)
    assert (space.lower, space.least, space.upper) == (100, 800, 1600)
    assert space_of(ratio=8, max_lambda=10).upper == 1000
    odd = CriticalSpace.of(300, 1000, 10000.0, 64, None, (0,))  # s = 3.333...
    assert (odd.least, odd.upper) == (334, 666)


@pytest.mark.parametrize(
    ("rope", "sentence"),
    [
        ((6, 10000.0, 64), "some of the 32 pairs turn 1 to 10 times, got 6, .* turn less than"),
        ((1 << 20, 10000.0, 64), "got 1048576, in which all turn more than 10 times"),
    ],
)
def test_a_length_without_critical_pairs_is_refused(rope, sentence):
    with pytest.raises(
        ValueError, match="critical_dimension: expected an original length .*" + sentence
    ):
        space_of(rope)


def test_a_bound_below_the_ratio_is_refused():
    with pytest.raises(
        ValueError, match="max_lambda: expected at least the extension ratio 8 with"
    ):
        space_of(max_lambda=7.9)


# --- moves ------------------------------------------------------------------------------------


@settings(deadline=None)
@given(st.data(), st.floats(0.01, 1.0), st.integers(0, 2**32))
def test_mutations_stay_in_the_space(data, probability, seed):
    space = data.draw(spaces())
    parent = data.draw(candidates(space))
    assert_inside(space, parent)
    assert_inside(space, space.mutate(parent, probability, random_of(seed)))


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**32))
def test_crossovers_stay_in_the_space_and_take_from_the_parents(data, seed):
    space = data.draw(spaces())
    a, b = data.draw(candidates(space)), data.draw(candidates(space))
    child = space.crossover(a, b, random_of(seed))
    assert_inside(space, child)
    assert child.critical_pair in (a.critical_pair, b.critical_pair)
    assert child.start_tokens in (a.start_tokens, b.start_tokens)
    free = child.hundredths[child.critical_pair :]
    assert set(free) <= {space.least, *a.hundredths, *b.hundredths}


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**32))
def test_snapping_ends_in_the_space_and_leaves_its_members_alone(data, seed):
    space = data.draw(spaces())
    wild = np.exp(random_of(seed).normal(1, 1, space.dims))
    assert_inside(space, space.snap(wild, space.start_tokens[-1]))
    assert_inside(space, space.start())
    inside = data.draw(candidates(space))
    assert space.snap_like(inside.lambdas, inside) == inside
    assert space.snap(inside.lambdas).hundredths == inside.hundredths


def test_what_is_not_in_the_space():
    space = space_of()
    inside = space.start()
    values = inside.hundredths
    assert inside in space
    assert Candidate(values) not in space
    assert Candidate(values, critical_pair=30) not in space
    assert Candidate(values, 3, critical_pair=31) not in space
    assert Candidate(values[:-1], critical_pair=31) not in space
    assert Candidate((*values[:-1], 1601), critical_pair=31) not in space
    assert Candidate((100, 100, *values[2:]), critical_pair=31) not in space
    assert Candidate((*values[:-2], 900, 899), critical_pair=31) not in space


def test_mutation_reaches_every_critical_pair_and_both_bounds():
    space = space_of()
    candidate, random = space.start(), random_of(0)
    pairs, seen = set(), []
    for _ in range(2000):
        candidate = space.mutate(candidate, 0.3, random)
        pairs.add(candidate.critical_pair)
        seen.append(candidate.hundredths)
    assert pairs == set(range(space.first, space.last + 1))
    low, high = np.min(seen, 0), np.max(seen, 0)
    assert low[-1] < 820 and high[-1] > 1580
    assert (high[19:] - low[19:] > 300).all()
    assert (high[1:19] > low[1:19]).all()
    unchanged = np.mean([space.mutate(candidate, 0.3, random).critical_pair
                         == candidate.critical_pair for _ in range(500)])  # fmt: skip
    assert unchanged == pytest.approx(0.7 + 0.3 / len(pairs), abs=0.06)


def test_parents_outside_of_the_space_have_children_in_it():
    problem = problem_of()
    seeds, random = problem.seeds(), random_of(0)
    for name in ("pi", "ntk", "yarn"):
        assert seeds[name] not in problem.space
        assert_inside(problem.space, problem.space.mutate(seeds[name], 0.3, random))
        child = problem.space.crossover(seeds[name], seeds["critical"], random)
        assert_inside(problem.space, child)


@settings(deadline=None)
@given(st.data(), st.integers(0, 2**32))
def test_free_lambdas_give_all(data, seed):
    space = data.draw(spaces())
    candidate = data.draw(candidates(space))
    matrix = space.free(candidate)
    lambdas = np.exp(matrix @ np.log(candidate.lambdas[candidate.critical_pair :]))
    assert np.abs(lambdas - candidate.lambdas).max() < 0.005 + 1e-9


# --- the population's first members -----------------------------------------------------------


def test_seeds_are_the_baselines_as_they_are_and_starts_in_the_space():
    plain, problem = problem_of(False), problem_of()
    seeds = problem.seeds()
    # Two go beyond the bound, which is another in this space.
    finite = [name for name in plain.seeds() if name not in ("dynamic-ntk", "cope")]
    assert {n: seeds[n] for n in finite} == {n: plain.seeds()[n] for n in finite}
    inside = {name: c for name, c in seeds.items() if name not in plain.seeds()}
    assert all(c in problem.space for c in inside.values())
    assert len(set(inside.values())) == len(inside) > 1
    start = np.array(inside["critical"].lambdas)
    assert inside["critical"].critical_pair == 31
    assert (start[31:] == 8).all()
    assert start[:31] == pytest.approx(8 ** (np.arange(31) / 31), abs=0.0051)


# --- searches ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    """A window of 48, in which pairs 1 and 2 of 8 can be critical."""
    return tiny_models.build(max_position_embeddings=48)


def search(model, documents, method="evolution", **changes):
    return longrope.search(
        model, documents, method=method, **SMALL | {"target_length": 66} | OPTIONS[method] | changes
    )


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", list(OPTIONS))
def test_a_search_stays_in_the_space_and_is_never_worse_than_yarn(
    model, documents, tmp_path, method
):
    result = search(model, documents, method, out=tmp_path, max_lambda=2.5)
    validated = {e.origin: e for e in result.history if e.role == "validation"}
    yarn = problem_of(False, (48, 10000.0, 16), 1, target_length=66).seeds()["yarn"]
    assert validated["yarn"].lambdas == yarn.lambdas
    assert result.validation_perplexity <= validated["yarn"].perplexity
    pairs = set()
    lines = journal_of(tmp_path).read_text().splitlines()
    for line, e in zip(lines[1:], result.history, strict=True):
        if e.origin in ("pi", "ntk", "yarn"):
            continue
        entry = json.loads(line)
        if e.role == "gradient":
            assert min(e.lambdas[2:]) >= 66 / 48 - 1e-9 and max(e.lambdas) <= 2.5 + 1e-9
            continue
        pair = entry.get("critical_pair")
        if pair is None:  # a baseline with other start tokens, or judged under another name
            continue
        pairs.add(pair)
        lambdas = np.array(e.lambdas)
        assert lambdas[:pair] == pytest.approx(
            lambdas[pair] ** (np.arange(pair) / pair), abs=0.0051
        )
        assert lambdas[pair:].min() >= 1.38 and lambdas.max() <= 2.5
    assert pairs == {1, 2} or method == "gradient"


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("method", list(OPTIONS))
def test_resuming_gives_the_uninterrupted_run(model, documents, tmp_path, method):
    expected = search(model, documents, method, out=tmp_path)
    content = journal_of(tmp_path).read_bytes()
    lines = content.splitlines(keepends=True)
    for count in range(1, len(lines), 9):
        journal_of(tmp_path).write_bytes(b"".join(lines[:count]))
        assert search(model, documents, method, out=tmp_path) == expected
        assert journal_of(tmp_path).read_bytes() == content


@pytest.mark.usefixtures("one_thread")
def test_the_descent_moves_the_pairs_below_with_the_critical_one(model, documents):
    result = search(model, documents, "gradient", steps=10, learning_rate=0.2)
    steps = [e for e in result.history if e.role == "gradient"]
    logs = np.log([e.lambdas for e in steps])
    assert np.ptp(logs[:, 2:], axis=0).max() > 0.01
    for log in logs:  # one of the two critical pairs, the same in all steps
        assert log[1] == pytest.approx(log[2] / 2, rel=1e-9) or log[1] >= np.log(66 / 48) - 1e-9
        assert log[0] == 0


@pytest.mark.usefixtures("one_thread")
def test_it_is_part_of_what_a_journal_binds(model, documents, tmp_path):
    search(model, documents, out=tmp_path / "with")
    search(model, documents, out=tmp_path / "without", critical_dimension=False)
    with pytest.raises(ValueError, match="critical_dimension: true there, null here"):
        search(model, documents, out=tmp_path / "with", critical_dimension=False)
    with pytest.raises(ValueError, match="critical_dimension: null there, true here"):
        search(model, documents, out=tmp_path / "without")


def journal_of(out):
    return out / "journal.jsonl"
