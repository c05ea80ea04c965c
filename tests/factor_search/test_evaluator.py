"""Measuring a population: each row its own candidate, the model as it was afterwards."""

import copy
import math

import numpy as np
import pytest
import torch

import longrope
from longrope.factor_search.evaluator import PopulationEvaluator, fingerprint
from longrope.factor_search.objective import digest, draw_windows
from longrope.factor_search.problem import PRESETS, Problem
from longrope.patching import rope_settings

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 48


@pytest.fixture(scope="module")
def problem(shared_model):
    return Problem.of(
        rope_settings(shared_model),
        target_length=LENGTH,
        original_length=None,
        attention_factor="yarn",
        start_tokens="search",
        max_lambda=None,
        preset=PRESETS["paper"],
    )


@pytest.fixture(scope="module")
def candidates(problem):
    random = np.random.default_rng(0)
    seeds = list(problem.seeds().values())
    children = [problem.space.mutate(seeds[i % 3], 0.5, random) for i in range(4)]
    return seeds + children


@pytest.fixture(scope="module")
def windows(documents):
    return draw_windows(documents, LENGTH, 3, np.random.default_rng(0))


def test_candidates_matter_here(shared_model, problem, candidates, windows):
    losses = PopulationEvaluator(shared_model, problem.factors, 4)(candidates, windows)
    assert np.ptp(losses) > 0.01


@pytest.mark.parametrize("rows", [2, 3, 5, 100])
def test_a_population_in_one_batch_equals_one_by_one(
    shared_model, problem, candidates, windows, rows
):
    together = PopulationEvaluator(shared_model, problem.factors, rows)(candidates, windows)
    alone = PopulationEvaluator(shared_model, problem.factors, 1)
    assert together == pytest.approx([alone([c], windows)[0] for c in candidates], abs=1e-4)


def test_equals_the_perplexity_of_the_model_with_the_factors_applied(
    model, problem, candidates, windows
):
    losses = PopulationEvaluator(model, problem.factors, 8)(candidates, windows)
    for candidate, loss in zip(candidates, losses, strict=True):
        longrope.apply(model, problem.factors(candidate))
        perplexity = longrope.perplexity(model, list(windows), length=LENGTH, stride=LENGTH)
        longrope.remove(model)
        assert loss == pytest.approx(math.log(perplexity), abs=1e-4)


def test_the_unit_of_work_is_whole_candidates(shared_model, problem, windows):
    for rows, candidates in ((1, 1), (3, 1), (5, 1), (6, 2), (100, 33)):
        evaluator = PopulationEvaluator(shared_model, problem.factors, rows)
        assert evaluator.candidates_per_batch(windows) == candidates


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_model_is_restored_also_when_the_measurement_is_interrupted(
    model, problem, candidates, windows, error
):
    model.train()
    model.model.layers[1].eval()
    flags = [module.training for module in model.modules()]
    ids = windows[:1]
    with torch.no_grad():
        before = model(ids).logits
    evaluator = PopulationEvaluator(model, problem.factors, 4)
    evaluator(candidates, windows)

    calls = []

    def interrupt(module, arguments):
        calls.append(module)
        if len(calls) == 2:
            raise error

    hook = model.model.layers[1].register_forward_pre_hook(interrupt)
    with pytest.raises(error):
        evaluator(candidates, windows)
    hook.remove()
    assert [module.training for module in model.modules()] == flags
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)


def test_fingerprint_tells_models_apart(model):
    original = fingerprint(model)
    assert fingerprint(copy.deepcopy(model)) == original
    model.config._name_or_path = "elsewhere"
    assert fingerprint(model) == original
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight[-1, -1] += 1e-3
    assert fingerprint(other) != original
    other = copy.deepcopy(model)
    other.config.max_position_embeddings = 17
    assert fingerprint(other) != original
    assert fingerprint(model.bfloat16()) != original


def test_windows_come_from_different_documents_first_and_never_overlap():
    documents = [
        torch.arange(start, start + size) for start, size in ((0, 35), (100, 10), (200, 20))
    ]
    seen = set()
    for seed in range(20):
        windows = draw_windows(documents, 10, 100, np.random.default_rng(seed))
        assert windows.shape == (6, 10)
        tokens = windows.flatten().tolist()
        assert len(set(tokens)) == len(tokens)
        assert all((w.diff() == 1).all() for w in windows)
        owner = [int(w[0]) // 100 for w in windows]
        assert set(owner[:3]) == {0, 1, 2}
        assert set(owner[3:5]) == {0, 2}
        assert owner[5] == 0
        seen.add(int(windows[owner.index(0)][0]))
    assert len(seen) > 5  # at random places
    assert draw_windows(documents, 10, 2, np.random.default_rng(0)).shape == (2, 10)


def test_windows_reach_both_ends_of_a_document():
    starts = {
        int(draw_windows([torch.arange(6)], 4, 1, np.random.default_rng(seed))[0, 0])
        for seed in range(50)
    }
    assert starts == {0, 1, 2}


def test_digest_depends_on_tokens_and_shape():
    windows = torch.arange(12).view(3, 4)
    assert digest(windows) == digest(windows.clone())
    assert len({digest(windows), digest(windows.view(4, 3)), digest(windows + 1)}) == 3
