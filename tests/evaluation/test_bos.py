"""BOS before every window: where it comes from, what is scored, and what stays as it was."""

import math

import numpy as np
import pytest
import torch
from support import tiny_models

import longrope
from longrope.documents import Documents
from longrope.evaluation.start import bos_token

BOS = 1


@pytest.fixture(scope="module")
def model():
    return tiny_models.build(bos_token_id=BOS)


@pytest.fixture
def text():
    return tiny_models.tokens(2, 50).clamp(min=3)


def by_hand(model, documents, length, stride):
    """Return the perplexity with BOS, one token at a time."""
    total, count = 0.0, 0
    text = length - 1
    for document in documents:
        end = 0
        for start in range(0, len(document), min(stride, text)):
            ids = torch.cat([torch.tensor([BOS]), document[start : start + text]])
            with torch.no_grad():
                logp = model(ids[None]).logits[0].double().log_softmax(-1)
            for index in range(1, len(ids)):
                place = start + index - 1
                new = place >= end
                if new and (index > 1 or start == 0):
                    total -= float(logp[index - 1, ids[index]])
                    count += 1
            end = start + len(ids) - 1
            if end == len(document):
                break
    return math.exp(total / count), count


@pytest.mark.parametrize(("length", "stride"), [(16, 4), (16, 16), (16, 15), (2, 1), (2, 2)])
def test_windows_are_bos_and_text_and_score_what_they_should(model, text, length, stride):
    expected, count = by_hand(model, text, length, stride)
    for documents in (text, [torch.cat([torch.tensor([BOS]), d]) for d in text]):
        found = longrope.perplexity(model, list(documents), length=length, stride=stride)
        assert found == pytest.approx(expected, rel=1e-5)
        assert found.tokens == count


def windows_of(model, run):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda module, arguments, named: seen.append(named["input_ids"].clone()), with_kwargs=True
    )
    run()
    hook.remove()
    return [row for ids in seen if ids.tolist() != [[0, 1, 2, 3]] for row in ids]


def test_no_window_has_more_than_one_and_none_is_longer(model, text):
    twice = [torch.cat([torch.tensor([BOS, BOS]), d]) for d in text]
    rows = windows_of(model, lambda: longrope.perplexity(model, twice, length=16, stride=8))
    assert len(rows) > 8
    assert all(row[0] == BOS and row[1] != BOS and len(row) <= 16 for row in rows)


def test_ranges_count_positions_with_bos(model, text):
    found = longrope.perplexity(
        model, list(text), length=16, stride=16, ranges=[(0, 1), (1, 2), (1, 16)]
    )
    assert math.isnan(found.by_range[0])  # BOS
    assert found.by_range[1] != found.by_range[2] == pytest.approx(found)


def test_without_bos_figures_are_what_they_were(text):
    plain = tiny_models.build()
    with_one = tiny_models.build(bos_token_id=BOS)
    expected = longrope.perplexity(plain, list(text), length=16, stride=8)
    assert longrope.perplexity(with_one, list(text), length=16, stride=8, bos=False) == expected
    assert longrope.perplexity(with_one, list(text), length=16, stride=8) != expected
    assert longrope.perplexity(plain, list(text), length=16, stride=8, bos=BOS) == (
        longrope.perplexity(with_one, list(text), length=16, stride=8)
    )


def test_where_bos_comes_from(model):
    plain, of_bytes = tiny_models.build(), tiny_models.build(vocab_size=256, bos_token_id=BOS)
    outside = tiny_models.build(bos_token_id=None)
    outside.config.bos_token_id = 50256
    some = [np.arange(9)]
    assert bos_token("auto", model, some) == BOS
    assert bos_token("auto", plain, some) is None
    assert bos_token("auto", of_bytes, some) is None
    assert bos_token("auto", outside, some) is None
    # What the tokenizer of the documents does is known, and wins.
    assert bos_token("auto", model, Documents(some, None)) is None
    assert bos_token("auto", plain, Documents(some, 7)) == 7
    assert bos_token(True, model, Documents(some, None)) == BOS
    assert bos_token(True, of_bytes, some) == BOS
    assert bos_token(False, model, some) is None
    assert bos_token(0, plain, some) == 0
    for bos, sentence in (
        ("always", "bos: expected 'auto', True, False or a token id, got 'always'"),
        (-1, "bos: expected 'auto'"),
        (64, "bos: expected a token of the model's vocabulary of 64, got 64"),
        (True, "bos: expected a model whose config names a bos_token_id"),
    ):
        with pytest.raises(ValueError, match=sentence):
            bos_token(bos, plain, some)
