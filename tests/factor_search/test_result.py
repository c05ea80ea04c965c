"""How a result of a search looks, at a prompt and in a notebook."""

from __future__ import annotations

from support import tiny_models

from longrope.factor_search.history import Evaluation, Role, SearchResult


def result(validation=2.5):
    found = tiny_models.factors(target=64)
    lambdas = tuple(found.lambdas)
    history = [
        Evaluation(role, 0, origin, lambdas, 0, nll, 1.0, 5)
        for role in (Role.SEARCH, Role.VALIDATION)
        for origin, nll in (("yarn", 1.5), ("mutation", 1.0))
    ]
    return SearchResult(found, 2.25, validation, tuple(history * 1000))


def test_the_repr_is_a_few_lines():
    text = repr(result())
    assert len(text.splitlines()) <= 10 and len(text) < 600
    assert "perplexity, search windows: 2.2500, 4.4817 with YaRN" in text
    assert "perplexity, held-out windows: 2.5000" in text
    assert "cost: 20000 forward passes of a window" in text
    assert "held-out" not in repr(result(validation=None))


def test_notebooks_get_a_table():
    shown = result()._repr_html_()
    assert shown.startswith("<table><tr><th>window</th><td>32 to 64 tokens</td></tr>")
    assert shown.count("<tr>") == shown.count("</tr>") == len(repr(result()).splitlines()) - 2
