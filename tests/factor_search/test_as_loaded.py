"""The model as loaded beside what a search finds."""

from __future__ import annotations

import csv
import warnings

import pytest
import torch
from support import tiny_models
from support.tiny_search import SIZES, SMALL, VOCABULARY, build_documents

import longrope
from longrope.factor_search import as_loaded
from longrope.factor_search.history import AS_LOADED

pytestmark = pytest.mark.usefixtures("one_thread")

TARGET = SMALL["target_length"]
SCALED = {
    "linear": {"rope_type": "linear", "factor": 1.5},
    "yarn": {"rope_type": "yarn", "factor": 1.5, "original_max_position_embeddings": 16},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16},
    "none": None,
}
#: The least of a search.
ONCE = {"population": 3, "mutations": 1, "crossovers": 1, "iterations": 1, "parents": 2}


def build(rope=None):
    return tiny_models.build(rope=rope, **(SIZES | {"max_position_embeddings": 24 if rope else 16}))


def windows(seed, count=2):
    """Return documents of one window each."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(VOCABULARY, (count, TARGET), generator=generator))


def said(model, documents, **changes):
    """Return a search's result and its warnings."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        result = longrope.search(model, documents, **(SMALL | changes))
    return result, [str(warning.message) for warning in found]


def plain(model, documents):
    return longrope.perplexity(model, documents, length=TARGET, stride=TARGET, bos=False)


@pytest.mark.parametrize("rope", SCALED.values(), ids=SCALED)
@pytest.mark.parametrize("applied", [False, True])
def test_it_is_the_model_as_it_stands_on_the_same_windows(rope, applied):
    model, searched, held_out = build(rope), windows(1), windows(2)
    if applied:
        factors = longrope.RescaleFactors.pi(
            original_length=16, target_length=24, rotary_dim=16, rope_theta=10000.0
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            longrope.apply(model, factors.ladder())
    result, _ = said(model, searched, validation=held_out, **ONCE)
    assert [(e.role, e.origin) for e in result.loaded] == [
        ("search", AS_LOADED), ("validation", AS_LOADED),
    ]  # fmt: skip
    for evaluation, documents in zip(result.loaded, (searched, held_out), strict=True):
        assert evaluation.perplexity == pytest.approx(plain(model, documents), rel=1e-5)
    own = applied or rope is not None
    assert (result.history[-2:] == result.loaded) == own
    assert own or AS_LOADED not in {e.origin for e in result.history}


def test_it_says_which_factors_were_applied():
    factors = longrope.RescaleFactors.yarn(
        original_length=16, target_length=24, rotary_dim=16
    ).replace(start_tokens=2)
    for applied in (factors, factors.ladder()):  # of tiers the last
        result, _ = said(longrope.apply(build(), applied), windows(1), **ONCE)
        expected = tuple(factors.lambdas.tolist()), 2, factors.attention_factor
        assert {e.factors for e in result.loaded} == {expected}


def test_a_result_that_is_worse_says_so(monkeypatch):
    """Never beaten silently: with a budget of the rules alone some model is better as loaded."""
    model = build(SCALED["linear"])
    monkeypatch.setattr(as_loaded, "_measure", lambda *_: 0.5)
    result, messages = said(model, build_documents(), **ONCE)
    (message,) = messages
    assert message == (
        "the factors found are worse than the model as loaded on the held-out windows, perplexity "
        f"{result.validation_perplexity:.4f} against 1.6487: keep the model as it is, or search "
        "longer"
    )
    monkeypatch.setattr(as_loaded, "_measure", lambda *_: 50.0)
    assert said(model, build_documents(), **ONCE)[1] == []


def test_the_table_has_it_and_a_run_that_resumes_too(tmp_path):
    model, documents = build(SCALED["yarn"]), build_documents()
    result, _ = said(model, documents, out=tmp_path, **ONCE)
    with (tmp_path / "history.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["origin"] == AS_LOADED]
    assert [float(row["perplexity"]) for row in rows] == [e.perplexity for e in result.loaded]
    again, _ = said(model, documents, out=tmp_path, **ONCE)
    assert again.history == result.history
    further, _ = said(model, documents, out=tmp_path, **(ONCE | {"iterations": 3}))
    assert further.loaded == result.loaded


def test_windows_in_chunks(monkeypatch):
    """In chunks a model whose frequencies follow the length of the whole is not measured."""
    from longrope.factor_search import run

    inner = run._notes
    monkeypatch.setattr(run, "_notes", lambda *given: inner(*given) | {"rows": 2, "chunk": 7})
    for name in ("linear", "none"):
        result, _ = said(build(SCALED[name]), windows(1), validation=windows(2), **ONCE)
        expected = plain(build(SCALED[name]), windows(2))
        assert result.loaded[1].perplexity == pytest.approx(expected, rel=1e-5)
    assert said(build(SCALED["dynamic"]), windows(1), **ONCE)[0].loaded == ()
