"""BOS in a search: before every window of every role, never scored, held to on resuming."""

import pytest
import torch
from support import tiny_models
from support.tiny_search import SIZES, SMALL, build_documents

import longrope
from longrope.errors import JournalError
from longrope.evaluation.nll import NextTokenNLL

BOS = 39


@pytest.fixture
def model():
    return tiny_models.build(**SIZES, **{"bos_token_id": BOS})


@pytest.fixture
def documents():
    return [document.clamp(max=BOS - 1) for document in build_documents()]


def rows(monkeypatch, run):
    """Return the windows that a search scores, and how many tokens of each."""
    seen = []
    for name in ("sums", "backward"):
        inner = getattr(NextTokenNLL, name)

        def spied(self, ids, scored, *rest, inner=inner):
            seen.extend((row, scored) for row in ids)
            return inner(self, ids, scored, *rest)

        monkeypatch.setattr(NextTokenNLL, name, spied)
    return run(), seen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"race": True},
        {"target_length": 96, "original_length": 16, "objective": "needle"},
        {"method": "gradient", "steps": 2, "population": None, "mutations": None,
         "crossovers": None, "iterations": None, "parents": None},
    ],
    ids=["evolution", "race", "needle", "gradient"],
)  # fmt: skip
def test_every_window_begins_with_it_once_and_does_not_score_it(
    model, documents, monkeypatch, options
):
    options = SMALL | options
    if options["target_length"] == 96:
        documents = [torch.cat([d, d]) for d in documents]
    documents = [torch.cat([torch.tensor([BOS]), d]) for d in documents]
    _, seen = rows(monkeypatch, lambda: longrope.search(model, documents, **options))
    assert seen
    for row, scored in seen:
        assert len(row) == options["target_length"]
        assert row[0] == BOS and not (row[1:] == BOS).any()
        assert scored <= len(row) - 2


def test_the_loss_is_that_of_the_text_after_bos(model, documents):
    text = documents[0][:31]
    only = [torch.cat([torch.tensor([BOS]), text])]  # room for one window: no choice of a place
    found = longrope.search(model, only, **SMALL | {"samples": 1})
    assert found.history[0].origin == "pi"
    longrope.apply(model, found.factors.replace(
        lambdas=found.history[0].lambdas, start_tokens=found.history[0].start_tokens
    ))  # fmt: skip
    with torch.no_grad():
        logp = model(only[0][None]).logits[0].log_softmax(-1)
    expected = -logp[1:-1].gather(1, text[1:, None]).mean()
    assert found.history[0].nll == pytest.approx(float(expected), rel=1e-5)


def test_resuming_needs_the_same(model, documents, tmp_path):
    first = longrope.search(model, documents, **SMALL, out=tmp_path)
    again = longrope.search(model, documents, **SMALL, out=tmp_path, bos=BOS)
    assert again.factors == first.factors and again.history == first.history
    with pytest.raises(JournalError, match="bos: 39 there, null here"):
        longrope.search(model, documents, **SMALL, out=tmp_path, bos=False)


def test_documents_in_compact_types_give_the_same_search(documents):
    model = tiny_models.build(**SIZES)
    expected = longrope.search(model, documents, **SMALL)
    compact = [document.to(torch.uint8) for document in documents]
    assert longrope.search(model, compact, **SMALL).history == expected.history
