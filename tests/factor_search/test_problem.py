"""The presets: what the paper and the official code searched with."""

import pytest

from longrope.factor_search.evolution import EvolutionSettings
from longrope.factor_search.options import PRESETS, SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factors.baselines import BASELINES
from longrope.patching import RopeSettings

PAPER = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 64, 128, 256)
OFFICIAL = (0, 1, 2, 4, 8, 12, 16, 20, 24, 28, 32, 48, 64)
LLAMA2 = RopeSettings("llama", 10000.0, 128, 128, 4096)


def space(preset, target_length=8 * 4096, **changes):
    options = SearchOptions(target_length=target_length, preset=preset, **changes)
    return Problem.of(LLAMA2, options).space


def test_sizes_and_documents():
    assert EvolutionSettings() == EvolutionSettings(64, 16, 16, 0.3, 40, 32)
    assert PRESETS["paper"].sizes == PRESETS["official-code"].sizes == EvolutionSettings()
    # Above 512k: halved sizes; the probability and the iterations are the same.
    assert PRESETS["paper-long"].sizes == EvolutionSettings(32, 8, 8, 0.3, 40, 16)
    assert {name: p.samples for name, p in PRESETS.items()} == {
        "paper": 5,
        "paper-long": 3,
        "official-code": 5,
    }


@pytest.mark.parametrize(
    ("preset", "ratio", "upper", "start_tokens"),
    [
        ("paper", 8, 1000, PAPER),
        ("paper", 64, 8000, PAPER),
        ("paper-long", 512, 64000, PAPER),
        ("official-code", 8, 900, OFFICIAL),
        ("official-code", 64, 6500, OFFICIAL),
    ],
)
def test_bounds_and_start_tokens(preset, ratio, upper, start_tokens):
    found = space(preset, ratio * 4096)
    assert (found.lower, found.upper, found.dims) == (100, upper, 64)
    assert found.start_tokens == start_tokens


def test_arguments_go_before_the_preset():
    found = space("official-code", max_lambda=3.5, start_tokens=7)
    assert (found.upper, found.start_tokens) == (350, (7,))
    assert space("paper", original_length=30, target_length=60).start_tokens == PAPER[:10]


def test_the_closed_forms_are_seeds_and_stopped_pairs_have_the_bound():
    problem = Problem.of(LLAMA2, SearchOptions(target_length=8 * 4096))
    for found in (problem.seeds(), problem.rules()):
        assert set(found) == set(BASELINES)
        assert all(c in problem.space for c in found.values())
    exact = problem.baselines()["cope"].lambdas
    assert exact[-1] == float("inf") and problem.seeds()["cope"].hundredths[-1] == 1000
    assert problem.seeds()["cope"].lambdas[40] == round(exact[40], 2)
    # On top of another scaling those that count from the base lie beyond the bound.
    stage = problem.baselines()["yarn"]
    above = Problem.of(LLAMA2, SearchOptions(target_length=16 * 4096), stage=stage)
    assert set(above.seeds()) == {f"stage {name}" for name in BASELINES}
    assert all(c in above.space for c in above.seeds().values())
    assert above.factors(above.rules()["cope"]).inv_freq()[-1] < 1e-15
