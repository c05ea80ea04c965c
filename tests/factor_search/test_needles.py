"""The objectives besides perplexity of whole windows: needles, and the last tokens alone."""

import numpy as np
import pytest
import torch

import longrope
from longrope.evaluation.needles import ANSWER_TOKENS, FIRST_PART, KEY_TOKENS, SHORTEST, plant

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = KEY_TOKENS + ANSWER_TOKENS
LENGTH = SHORTEST


@pytest.fixture(scope="module")
def documents():
    generator = torch.Generator().manual_seed(9)
    return list(torch.randint(40, (6, LENGTH + 20), generator=generator))


def search(model, documents, **options):
    settings = {
        "target_length": LENGTH, "samples": 2, "method": "evolution", "progress": False, **options
    }  # fmt: skip
    if settings["method"] == "evolution":
        settings |= {"population": 5, "iterations": 1}
    return longrope.search(model, documents, **settings)


def test_the_needle_is_near_the_begin_and_again_at_the_end():
    windows = torch.arange(3 * 400).view(3, 400)  # every token once: places can be read off
    planted = plant(windows, np.random.default_rng(0))
    assert planted.shape == windows.shape
    for text, window in zip(windows, planted, strict=True):
        needle = window[-SIZE:]
        assert set(needle.tolist()) <= set(text.tolist())
        found = [p for p in range(400 - SIZE) if torch.equal(window[p : p + SIZE], needle)]
        assert len(found) == 1
        assert found[0] <= FIRST_PART * 400
        rest = torch.cat([window[: found[0]], window[found[0] + SIZE : -SIZE]])
        assert torch.equal(rest, text[: len(rest)])


def test_needles_differ_by_window_and_follow_the_random_state():
    windows = torch.arange(300).expand(4, 300)
    planted = plant(windows, np.random.default_rng(0))
    assert len({tuple(window.tolist()) for window in planted}) == 4
    assert torch.equal(planted, plant(windows, np.random.default_rng(0)))


@pytest.mark.parametrize("method", ["evolution", "gradient"])
def test_the_loss_of_a_needle_is_that_of_its_answer(shared_model, documents, method, monkeypatch):
    """A model that knows everything but the last tokens has no loss on them alone."""
    from longrope.factor_search import run

    seen = []
    measure = run.PopulationEvaluator.__call__

    def measuring(self, candidates, windows):
        losses = measure(self, candidates, windows)
        seen.append((self.to_factors(candidates[0]), windows, losses[0]))
        return losses

    monkeypatch.setattr(run.PopulationEvaluator, "__call__", measuring)
    options = {} if method == "evolution" else {"steps": 2, "start_tokens": 0}
    result = search(shared_model, documents, method=method, objective="needle", **options)
    factors, windows, loss = seen[0]
    assert all(torch.equal(w[-SIZE:], plant_of(w)) for w in windows)
    longrope.apply(shared_model, factors)
    with torch.no_grad():
        logits = shared_model(windows).logits[:, -ANSWER_TOKENS - 1 : -1]
    longrope.remove(shared_model)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), windows[:, -ANSWER_TOKENS:].flatten()
    )
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert result.validation_perplexity is not None


def plant_of(window):
    """Return the first place's needle of a window, found by its repetition at the end."""
    end = window[-SIZE:]
    for place in range(len(window) - 2 * SIZE + 1):
        if torch.equal(window[place : place + SIZE], end):
            return window[place : place + SIZE]
    raise AssertionError("no needle")


def test_only_the_last_tokens_are_scored_where_asked(shared_model, documents):
    result = search(
        shared_model, documents, last_tokens=10, validation=[d[:LENGTH] for d in documents[4:]]
    )
    longrope.apply(shared_model, result.factors)
    with torch.no_grad():
        ids = torch.stack([d[:LENGTH] for d in documents[4:]])
        logits = shared_model(ids).logits[:, -11:-1]
    longrope.remove(shared_model)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, -10:].flatten())
    assert np.log(result.validation_perplexity) == pytest.approx(expected.item(), abs=1e-4)


def test_a_gradient_of_the_last_tokens_only(shared_model, documents):
    one = [documents[0][:LENGTH]]
    options = {"method": "gradient", "steps": 1, "start_tokens": 0}
    few = search(shared_model, one, last_tokens=3, **options)
    every = search(shared_model, one, **options)
    assert few.history != every.history
    step = next(e for e in few.history if e.role == "gradient")
    # The first step is made at a candidate that was measured on the same window.
    same = [e for e in few.history if e.role == "search" and np.allclose(e.lambdas, step.lambdas)]
    assert step.nll == pytest.approx(same[0].nll, abs=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"last_tokens": 0}, "last_tokens: expected an integer of at least 1, got 0"),
        ({"last_tokens": 4, "objective": "needle"}, "last_tokens: expected None with objective="),
        ({"objective": "needle", "target_length": 95}, "target_length: expected at least 96 tok"),
    ],
)
def test_bad_input_is_one_sentence(shared_model, documents, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        search(shared_model, documents, **options)


def test_the_journal_of_another_objective_is_refused(shared_model, documents, tmp_path):
    search(shared_model, documents, out=tmp_path)
    with pytest.raises(ValueError, match="objective: "):
        search(shared_model, documents, out=tmp_path, objective="needle")
    with pytest.raises(ValueError, match="last_tokens: null there, 7 here"):
        search(shared_model, documents, out=tmp_path, last_tokens=7)
