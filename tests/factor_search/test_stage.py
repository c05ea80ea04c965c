"""A search on a model that has factors, tiers or a scaling: stage one, and what comes on top."""

import json

import numpy as np
import pytest
import torch
from support import tiny_models
from support.tiny_search import SIZES, build_documents

import longrope
from longrope import RescaleFactors, Tiers
from longrope.factor_search import folder
from longrope.factor_search.history import AS_LOADED
from longrope.factor_search.options import SearchOptions
from longrope.factor_search.problem import Problem
from longrope.factor_search.stage import stage_of, tiers_as_found
from longrope.patching import rope_settings

pytestmark = pytest.mark.usefixtures("one_thread")
ORIGINAL, WINDOW, TARGET = 16, 32, 64
LENGTHS = {"original_length": ORIGINAL, "rotary_dim": 16}
SMALL = {"target_length": TARGET, "samples": 2, "steps": 4, "start_tokens": 0, "progress": False}
SIZES_OF_EVOLUTION = {"population": 5, "mutations": 2, "crossovers": 2, "iterations": 2}
EVOLUTION = {"method": "evolution", "parents": 3} | SIZES_OF_EVOLUTION
#: Not a rule, not on the grid.
FIRST = RescaleFactors(
    np.geomspace(1, 2.173, 8), attention_factor=1.03, target_length=WINDOW, **LENGTHS
)


@pytest.fixture(scope="module")
def texts():
    return build_documents()


def build(rope=None, **changes):
    return tiny_models.build(rope=rope, **SIZES | changes)


def scaled():
    """Return a model whose config names PI for twice the window."""
    rope = {"rope_type": "linear", "factor": 2.0}
    return build(rope=rope, max_position_embeddings=WINDOW)


def with_factors():
    return longrope.apply(build(), FIRST)


def with_tiers():
    return longrope.apply(build(), FIRST.ladder())


def search(model, texts, **changes):
    options = SMALL | changes
    if options.get("method") == "evolution":
        options = {k: v for k, v in options.items() if k != "steps"}
    return longrope.search(model, texts, **options)


def perplexity(model, factors, texts):
    longrope.apply(model, factors)
    try:
        return longrope.perplexity(model, texts, length=TARGET, stride=TARGET)
    finally:
        longrope.remove(model)


@pytest.mark.parametrize("options", [{}, EVOLUTION], ids=["gradient", "evolution"])
@pytest.mark.parametrize("found", [scaled, with_factors, with_tiers])
def test_the_result_on_the_plain_model_is_what_was_measured(texts, found, options):
    held_out = [text[:TARGET] for text in texts[5:]]
    result = search(found(), texts[:5], validation=held_out, **options)
    measured = perplexity(build(), result.factors, held_out)  # the base, unscaled
    assert result.validation_perplexity == pytest.approx(measured, rel=1e-4)
    first, second = result.stages
    assert first.target_length == WINDOW == second.original_length
    product = first * second
    np.testing.assert_allclose(product.lambdas, result.factors.lambdas, rtol=1e-12)
    assert product.attention_factor == pytest.approx(result.factors.attention_factor)
    assert (product.original_length, product.target_length) == (ORIGINAL, TARGET)
    expected = RescaleFactors.pi(target_length=WINDOW, **LENGTHS) if found is scaled else FIRST
    np.testing.assert_allclose(first.lambdas, expected.lambdas)
    origins = {e.origin for e in result.history}
    assert {"stage pi", "stage ntk", "stage yarn", "yarn"} <= origins


def test_the_logits_are_those_of_the_product(texts):
    """Applied to the plain model: what the scaled model computes with a second stage on top."""
    result = search(with_factors(), texts)
    ids = torch.stack([text[:TARGET] for text in texts])
    with torch.no_grad():
        one = longrope.apply(build(), result.factors)(ids).logits
        first, second = result.stages
        both = longrope.apply(build(), first * second)(ids).logits
    torch.testing.assert_close(one, both, rtol=1e-5, atol=1e-5)


def test_history_counts_from_the_base(texts):
    """The rules keep their lambdas; what is on top of the stage is its multiple."""
    result = search(scaled(), texts)
    by_origin = {e.origin: e for e in result.history}
    assert by_origin["pi"].lambdas == (4.0,) * 8
    assert by_origin["stage pi"].lambdas == (4.0,) * 8  # PI on PI
    ntk = RescaleFactors.ntk(target_length=TARGET, **LENGTHS).lambdas
    np.testing.assert_allclose(by_origin["ntk"].lambdas, ntk, atol=0.005)
    on_top = RescaleFactors.ntk(original_length=WINDOW, target_length=TARGET, rotary_dim=16)
    np.testing.assert_allclose(by_origin["stage ntk"].lambdas, 2 * on_top.lambdas, atol=0.01)
    steps = [e for e in result.history if e.role == "gradient"]
    assert all(min(e.lambdas) >= 2 * (1 - 1e-12) for e in steps)
    assert all(max(e.lambdas) <= 2 * 2.5 * (1 + 1e-12) for e in steps)


def test_the_model_keeps_what_it_had(texts):
    ids = texts[0][None, :TARGET]
    for found in (scaled, with_factors, with_tiers):
        model = found()
        before = model(ids).logits
        search(model, texts, ladder=True)
        assert torch.equal(model(ids).logits, before)


def test_ignoring_starts_from_the_base(texts):
    plain = search(build(), texts)
    assert plain.stages == (plain.factors,)
    for found in (scaled, with_factors, with_tiers):
        again = search(found(), texts, scaling="ignore", original_length=ORIGINAL)
        assert again.factors == plain.factors
        # Without the model as loaded, which has a scaling of its own here.
        measured = [e.nll for e in again.history if e.origin != AS_LOADED]
        assert measured == pytest.approx([e.nll for e in plain.history])
        assert len(again.stages) == 1


def test_a_ladder_goes_on_above_the_tiers_that_are_applied(texts):
    applied = FIRST.ladder()
    held_out = [text[:TARGET] for text in texts[5:]]
    result = search(with_tiers(), texts[:5], validation=held_out, ladder=True)
    assert result.tiers[:2] == applied
    assert result.tiers.limits == (ORIGINAL, WINDOW, TARGET)
    assert result.tiers[-1] == result.factors
    assert {e.tier for e in result.history} == {1}
    first, second = result.stages
    np.testing.assert_allclose((first * second).lambdas, result.factors.lambdas)
    assert first == FIRST


def test_what_a_model_has_when_a_search_begins():
    def found(model, scaling="compose"):
        return tiers_as_found(model, rope_settings(model), ORIGINAL, scaling)

    none = Tiers([RescaleFactors.none(**LENGTHS)])
    assert found(build()) == none
    assert stage_of(none) is None
    assert found(with_factors()) == Tiers([FIRST])
    assert found(with_tiers()) == FIRST.ladder()
    assert found(with_tiers(), "ignore") == found(scaled(), "ignore") == none
    assert found(scaled()).limits == (WINDOW,)
    dynamic = build(rope={"rope_type": "dynamic", "factor": 2.0})
    assert found(dynamic) == none


def test_a_pair_that_the_stage_has_stopped_stays_stopped():
    stage = FIRST.replace(lambdas=[*FIRST.lambdas[:-1], np.inf])
    rope = rope_settings(build())
    problem = Problem.of(rope, SearchOptions(target_length=TARGET), stage=stage)
    for name, candidate in problem.seeds().items():
        factors = problem.factors(candidate)
        assert factors.inv_freq()[-1] == 0, name
        assert np.isfinite(problem.stage_parts(factors)[1].lambdas).all()
    assert np.isfinite(problem.turns()).all()
    assert len(problem.on_stage(problem.rules()["ntk"])) == 8


def test_a_run_on_a_stage_with_a_stopped_pair_is_kept_and_resumed(texts, tmp_path):
    """JSON has no number for its infinite lambda."""
    stage = FIRST.replace(lambdas=[*FIRST.lambdas[:-1], np.inf])
    for ladder in (False, True):
        out = tmp_path / str(ladder)
        first, again = (
            search(longrope.apply(build(), stage), texts, out=out, ladder=ladder) for _ in range(2)
        )
        assert first == again
        assert first.stages[0] == stage
        assert folder.summary(out)["state"] == "finished"


def test_another_stage_is_another_search(texts, tmp_path):
    search(with_factors(), texts, out=tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["problem"]["stage"]
    with pytest.raises(ValueError, match=r"out: .* is the journal of another search \(model, its"):
        search(build(), texts, out=tmp_path)
    again = search(with_factors(), texts, out=tmp_path)  # from the journal
    assert again.factors == RescaleFactors.load(tmp_path / "factors.json")


def test_factors_that_count_from_another_window_than_the_config_says(texts):
    own = FIRST.replace(original_length=8)
    with pytest.warns(UserWarning, match="count from an original length of 8"):
        model = longrope.apply(build(), own)
    result = search(model, texts, ladder=True)
    assert [tier.original_length for tier in result.tiers] == [8, 8]
    first, second = result.stages
    assert (first * second).original_length == result.factors.original_length == 8


def test_what_is_said_of_its_folder(texts, tmp_path):
    """The factors that came back are found in the journal, which has them on top of the stage."""
    result = search(with_factors(), texts, out=tmp_path)
    facts = folder.summary(tmp_path)
    assert facts["chosen, on the search windows"].startswith(f"perplexity {result.perplexity:.4f}")
    assert facts["chosen, on the held-out windows"].startswith(
        f"perplexity {result.validation_perplexity:.4f}"
    )


def test_bad_input(texts):
    with pytest.raises(ValueError, match="target_length: expected more than the window of the mod"):
        search(with_factors(), texts, target_length=24)
    with pytest.raises(ValueError, match="original_length: expected 16, from which the factors or"):
        search(scaled(), texts, original_length=24)
    with pytest.raises(ValueError, match="scaling: expected one of 'compose', 'ignore', got 'n"):
        search(build(), texts, scaling="no")
