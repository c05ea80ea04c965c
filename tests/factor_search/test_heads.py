"""`longrope.search(per="layer" | "head")`: on from shared factors; resuming, bounds, bad input."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_search import SIZES, build_documents

import longrope
from longrope import report
from longrope.errors import JournalError
from longrope.evaluation.memory import WHOLE_WINDOWS
from longrope.factor_search import folder, heads
from longrope.factor_search.descent import DescentSettings, HeadDescent, Point
from longrope.factor_search.gradient import GradientEvaluator
from longrope.factor_search.history import Role
from longrope.report.search_data import Search

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"target_length": 64, "samples": 2, "steps": 4, "start_tokens": 0, "progress": False}


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(**(SIZES | {"num_key_value_heads": 2}))


@pytest.fixture(scope="module")
def texts():
    return build_documents()


@pytest.fixture
def no_margin(monkeypatch):
    """Take whatever is best on the deciding windows."""
    monkeypatch.setattr(heads, "GAIN", -1.0)


def values(history):
    return [(e.role, e.iteration, e.origin, e.factors, e.nll, e.tier, e.passes) for e in history]


@pytest.mark.parametrize("ladder", [False, True])
@pytest.mark.parametrize("per", ["layer", "head"])
def test_search(model, texts, per, ladder, no_margin):
    """It begins with the shared result, never loses to it where it counts, and stays in bounds."""
    shared = longrope.search(model, texts, ladder=ladder, **SMALL)
    found = longrope.search(model, texts, ladder=ladder, per=per, **SMALL)
    assert found.shared.factors == shared.factors
    assert values(found.history[: len(shared.history)]) == values(shared.history)
    every = [found.factors] if found.tiers is None else list(found.tiers)[1:]
    every = [own for own in every if own.per_head]  # a tier may stay with the shared ones
    assert {own.heads for own in every} == {(2, 2 if per == "head" else 1)}
    assert found.validation_perplexity <= shared.validation_perplexity
    began = [shared.factors] if shared.tiers is None else list(shared.tiers)[1:]
    every_tier = [found.factors] if found.tiers is None else list(found.tiers)[1:]
    for own, start in zip(every_tier, began, strict=True):
        if own.per_head:  # what exports hold, and its cost
            assert own.shared.factors == start
            assert own.shared.perplexity == shared.validation_perplexity
            assert own.shared.own_perplexity == found.validation_perplexity
    for own in every:
        assert (np.diff(own.lambdas, axis=-1) >= 0).all()
        assert own.lambdas.min() >= 1
        assert own.lambdas.max() <= 1.25 * own.ratio + 1e-9
        assert (np.ptp(own.lambdas, axis=(0, 1)) > 0).any()


def test_it_is_kept_only_where_it_gains(model, texts, monkeypatch):
    monkeypatch.setattr(heads, "GAIN", 1e9)
    found = longrope.search(model, texts, per="head", **SMALL)
    assert found.factors == found.shared.factors
    assert found.validation_perplexity == pytest.approx(found.shared.validation_perplexity)


@pytest.mark.parametrize("ladder", [False, True])
def test_resumes_to_the_bit(model, texts, tmp_path, ladder, no_margin):
    """From a journal that ends anywhere: in the shared search, at a step, at a measurement."""
    options = SMALL | {"ladder": ladder, "per": "head"}
    whole = longrope.search(model, texts, out=tmp_path / "run", **options)
    journal = tmp_path / "run" / "journal.jsonl"
    lines = journal.read_text().splitlines(keepends=True)
    own = [n for n, line in enumerate(lines) if '"heads": [' in line]
    steps = [n for n in own if json.loads(lines[n])["role"] == Role.GRADIENT]
    assert len(steps) == sum(e.origin == "heads" and e.role == Role.GRADIENT for e in whole.history)
    for cut in (own[0], steps[1], steps[-1] + 1, len(lines) - 1):
        journal.write_text("".join(lines[:cut]))
        again = longrope.search(model, texts, out=tmp_path / "run", **options)
        assert again.factors == whole.factors
        assert again.tiers == whole.tiers
        assert values(again.history) == values(whole.history)
        assert journal.read_text().splitlines(keepends=True)[1:] == lines[1:]
    again = longrope.RescaleFactors.load(tmp_path / "run" / "factors.json")
    assert (again, again.shared) == (whole.factors, whole.factors.shared)
    report.write(tmp_path / "run")
    assert (tmp_path / "run" / "plots" / "heads.png").exists() == whole.factors.per_head
    for per in ("layer", "model"):
        with pytest.raises(JournalError, match=rf"\(per: 'head' there, '{per}' here\); choose"):
            longrope.search(model, texts, out=tmp_path / "run", **(options | {"per": per}))


@pytest.mark.parametrize("ladder", [False, True])
def test_a_search_for_all_heads_goes_on(model, texts, tmp_path, ladder, no_margin):
    """A folder of `per="model"` goes on to the bits of a search that began with `per="head"`."""
    options = SMALL | {"ladder": ladder}
    whole = longrope.search(model, texts, out=tmp_path / "whole", per="head", **options)
    shared = longrope.search(model, texts, out=tmp_path / "run", **options)
    before = (tmp_path / "run" / "journal.jsonl").read_text()
    found = longrope.search(model, texts, out=tmp_path / "run", per="head", **options)
    assert found.shared.factors == shared.factors
    assert (found.factors, found.tiers) == (whole.factors, whole.tiers)
    assert values(found.history) == values(whole.history)
    after = (tmp_path / "run" / "journal.jsonl").read_text()
    assert after.startswith(before) and len(after) > len(before)


def test_a_search_that_went_on_is_not_finished_until_its_own_end(model, texts, tmp_path):
    def state():
        return folder.summary(tmp_path)["state"].partition(";")[0], Search.read(tmp_path).finished

    def stop(evaluations):
        if evaluations[0].origin == heads.OWN:
            raise KeyboardInterrupt

    longrope.search(model, texts, out=tmp_path, **SMALL)
    assert state() == ("finished", True)
    with pytest.raises(KeyboardInterrupt):
        longrope.search(model, texts, out=tmp_path, **SMALL | {"per": "head", "progress": stop})
    assert state() == ("not finished", False)
    longrope.search(model, texts, out=tmp_path, **SMALL | {"per": "head"})
    assert state() == ("finished", True)


def test_the_gradient_is_that_of_every_head(model, texts):
    """Against finite differences, and its sum against that of the shared factors."""
    double = tiny_models.build(**(SIZES | {"num_key_value_heads": 2})).double()
    base = longrope.rope_settings(double)
    unit = longrope.RescaleFactors.none(**base.lengths(16)).base_inv_freq()
    evaluate = GradientEvaluator(double, unit, WHOLE_WINDOWS)
    windows = torch.stack([text[:48] for text in texts[:1]])
    log_lambdas = np.linspace(0, 1, len(unit))
    random = np.random.default_rng(0)
    point = Point(
        log_lambdas + 0.1 * random.standard_normal((2, 2, len(unit))),
        1.1 + 0.1 * random.random((2, 2)),
    )
    _, gradient = evaluate(point, 0, windows)
    step = 2e-3  # losses are float32 sums
    for layer, head, pair in ((0, 1, 3), (1, 0, 1)):
        losses = []
        for sign in (1, -1):
            moved = point.log_lambdas.copy()
            moved[layer, head, pair] += sign * step
            losses.append(evaluate(Point(moved, point.attention_factor), 0, windows)[0])
        slope = (losses[0] - losses[1]) / (2 * step)
        at = np.ravel_multi_index((layer, head, pair), point.log_lambdas.shape)
        assert gradient[at] == pytest.approx(slope, rel=5e-3, abs=5e-5)
    alike = Point(np.broadcast_to(log_lambdas, (2, 2, len(unit))), np.full((2, 2), 1.1))
    loss, by_head = evaluate(alike, 0, windows)
    expected, shared = evaluate(Point(log_lambdas, 1.1), 0, windows)
    assert loss == pytest.approx(expected, rel=1e-12)
    summed = by_head[:-4].reshape(4, -1).sum(0)
    np.testing.assert_allclose(summed, shared[:-1], rtol=1e-6, atol=1e-9)
    assert by_head[-4:].sum() == pytest.approx(shared[-1], rel=1e-6)


def test_the_descent_projects_each_head():
    """Heads with gradients of their own end at their own minima, monotone and in bounds."""
    settings = DescentSettings(steps=200, learning_rate=0.1)
    descent = HeadDescent(np.ones(3), 4.0, settings, 1.0, learn_attention=True)
    goals = np.log(np.array([[[1.0, 2, 3], [3, 2, 1]], [[0.5, 1, 9], [2, 2, 2]]]))

    def loss_and_gradient(point, step):
        lambdas = point.log_lambdas - goals
        factors = np.log(point.attention_factor) - 0.1
        return 0.0, np.concatenate([lambdas.ravel(), factors.ravel()])

    start = Point(np.zeros((2, 2, 3)), np.ones((2, 2)))
    end = descent.run(start, loss_and_gradient, range(200))
    third = np.cbrt(6)
    expected = np.array([[[1, 2, 3], [third] * 3], [[1, 1, 4], [2, 2, 2]]])
    np.testing.assert_allclose(end.lambdas, expected, rtol=0.03)
    np.testing.assert_allclose(end.attention_factor, np.full((2, 2), np.exp(0.1)), rtol=0.02)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "evolution"}, "per: expected 'model' with method='evolution', got 'head'"),
        ({"critical_dimension": True}, "per: expected 'model' with critical_dimension=True"),
        ({"per": "pair"}, "per: expected "),
    ],
)
def test_refusals(model, texts, options, message):
    given = {k: v for k, v in SMALL.items() if k != "steps"} | {"per": "head"} | options
    with pytest.raises(ValueError, match=f"^{message}"):
        longrope.search(model, texts, **given)


def test_on_top_of_factors_by_head_it_is_refused(model, texts):
    shared = longrope.RescaleFactors.yarn(
        original_length=16, target_length=32, rotary_dim=16
    ).spread(2, 2)
    longrope.apply(model, shared)
    try:
        with pytest.raises(ValueError, match=r"^model: expected factors for all layers and heads"):
            longrope.search(model, texts, **SMALL)
    finally:
        longrope.remove(model)
