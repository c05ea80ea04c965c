"""Measuring a population: each row its own candidate, the model as it was afterwards."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from support import tiny_models, tiny_search

import longrope
from longrope import ops
from longrope.evaluation.identity import digest, fingerprint
from longrope.factor_search.evaluator import PopulationEvaluator
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.windows import draw_windows
from longrope.patching import rope_settings

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH = 48


@pytest.fixture(scope="module")
def problem(shared_model):
    options = SearchOptions(target_length=LENGTH, attention_factor="yarn")
    return Problem.of(rope_settings(shared_model), options)


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


@pytest.fixture(scope="module")
def sliding_model():
    """A model whose layers see 20 tokens."""
    torch.manual_seed(3)
    return tiny_models.build("mistral", **tiny_search.SIZES, sliding_window=20)


@pytest.mark.parametrize("name", ["shared_model", "sliding_model"])
@pytest.mark.parametrize(
    ("rows", "chunk", "last_tokens"), [(5, 7, None), (1, 16, 9), (6, 1, 9), (4, 47, None)]
)
def test_chunks_equal_whole_windows_one_by_one(
    name, problem, candidates, windows, rows, chunk, last_tokens, request
):
    """Start tokens lie in the first chunk, in several, and in all of them."""
    model = request.getfixturevalue(name)
    candidates = [
        dataclasses.replace(c, start_tokens=n)
        for c, n in zip(candidates[-4:], (0, 3, 16, 47), strict=True)
    ]
    evaluator = PopulationEvaluator(model, problem.factors, rows, last_tokens, chunk)
    alone = PopulationEvaluator(model, problem.factors, 1, last_tokens)
    expected = [alone([c], windows)[0] for c in candidates]
    assert evaluator(candidates, windows) == pytest.approx(expected, abs=1e-4)
    assert np.ptp(expected) > 0.01
    plain = [dataclasses.replace(c, start_tokens=0) for c in candidates]
    assert np.abs(np.subtract(alone(plain, windows), expected)).max() > 0.01


def test_chunks_meet_the_model_one_at_a_time(shared_model, problem, candidates, windows):
    seen = []
    hook = shared_model.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        evaluator = PopulationEvaluator(shared_model, problem.factors, 2, 9, 20)
        seen.clear()
        evaluator(candidates[:1], windows)
    finally:
        hook.remove()
    assert seen == [
        (2, 20),
        (2, 20),
        (2, 7),
        (1, 20),
        (1, 20),
        (1, 7),
    ]  # the last token is not read


@pytest.mark.parametrize("chunk", [None, 11])
@pytest.mark.parametrize("blocks", [1, 4, 5, 47])
def test_block_sums(shared_model, problem, candidates, windows, blocks, chunk):
    evaluator = PopulationEvaluator(shared_model, problem.factors, 4, chunk=chunk)
    sums, counts = evaluator.block_sums(candidates, windows, blocks)
    assert sums.shape == (len(candidates), len(windows), blocks) and sums.dtype == torch.float64
    assert counts.shape == (blocks,) and counts.sum() == LENGTH - 1
    assert counts.max() - counts.min() <= 1
    expected = evaluator(candidates, windows)
    mean = sums.sum((1, 2)) / (len(windows) * counts.sum())
    assert mean.tolist() == pytest.approx(expected, rel=1e-12)
    # Token by token, with the factors applied.
    longrope.apply(shared_model, problem.factors(candidates[2]))
    with torch.no_grad():
        logits = shared_model(windows).logits[:, :-1]
    longrope.remove(shared_model)
    nll = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none"
    ).view(len(windows), -1)
    for window in range(len(windows)):
        by_block = [part.double().sum().item() for part in nll[window].split(counts.tolist())]
        assert sums[2, window].tolist() == pytest.approx(by_block, abs=1e-3)


def test_block_sums_of_the_last_tokens(shared_model, problem, candidates, windows):
    every = PopulationEvaluator(shared_model, problem.factors, 4)
    last = PopulationEvaluator(shared_model, problem.factors, 4, 9)
    sums, counts = last.block_sums(candidates, windows, 3)
    assert counts.tolist() == [3, 3, 3]
    one_by_one, _ = every.block_sums(candidates, windows, LENGTH - 1)
    torch.testing.assert_close(
        sums, one_by_one[..., -9:].unflatten(2, (3, 3)).sum(3), rtol=1e-4, atol=1e-4
    )
    for blocks in (0, 10):
        with pytest.raises(ValueError, match=f"blocks: expected 1 to the 9 .*, got {blocks}"):
            last.block_sums(candidates, windows, blocks)


def test_the_models_attention_is_ops_attention_meanwhile(
    shared_model, problem, candidates, windows, monkeypatch
):
    calls = []

    def counted(q, k, v, **options):
        calls.append(k.shape)
        return attention(q, k, v, **options)

    attention = ops.attention
    evaluator = PopulationEvaluator(shared_model, problem.factors, 3, chunk=24)
    monkeypatch.setattr(ops, "attention", counted)
    evaluator(candidates[:1], windows)
    layers = shared_model.config.num_hidden_layers
    assert calls == [(3, 1, 24, 16)] * layers + [(3, 1, 47, 16)] * layers
    assert shared_model.config._attn_implementation == "sdpa"
