"""LongPPL against its definition, token by token, and what surrounds it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from support import tiny_models

import longrope
from longrope.evaluation import long_perplexity as module
from longrope.evaluation import memory

pytestmark = pytest.mark.usefixtures("one_thread")
LENGTH, SHORT, BLOCK = 100, 32, 12


def build(**changes):
    """Return a model sure enough of itself that its context makes some tokens likely."""
    model = tiny_models.build(**changes)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    return model


@pytest.fixture
def model():
    return build()


def copies(count=3, size=LENGTH):
    """Return documents whose second half the model itself has written, by chance."""
    random = np.random.default_rng(0)
    return [random.integers(1, 64, size) for _ in range(count)]


def written(model, count=3):
    """Return documents that the model finds likely: sampled from it with the whole context."""
    start = torch.from_numpy(np.stack(copies(count, 10)))
    made = model.generate(
        start, attention_mask=torch.ones_like(start), max_new_tokens=LENGTH - 10, do_sample=True,
        top_k=0, pad_token_id=0,
    )  # fmt: skip
    return list(made)


def by_definition(model, document, bos=None, length=LENGTH):
    """Return `l` and `s` of the tokens from SHORT on, one forward pass for each."""
    text = document[: length - (bos is not None)]
    front = [] if bos is None else [bos]

    def log_probability(context, token):
        ids = torch.tensor([front + list(map(int, context))])
        return float(model(ids).logits[0, -1].log_softmax(-1)[int(token)])

    with torch.no_grad():
        full = [log_probability(text[:i], text[i]) for i in range(SHORT, len(text))]
        short = [
            log_probability(text[(i - SHORT) // BLOCK * BLOCK : i], text[i])
            for i in range(SHORT, len(text))
        ]
    return np.array(full), np.array(short)


@pytest.mark.parametrize("bos", [False, 5])
def test_is_the_definition_token_by_token(model, bos):
    documents = written(model)
    found = longrope.long_perplexity(
        model, documents, length=LENGTH, short=SHORT, block=BLOCK, bos=bos
    )
    all_full, keys = [], []
    for document in documents:
        full, short = by_definition(model, document, None if bos is False else bos)
        all_full.append(full)
        keys.append((full - short > 2) & (full > -2))
    full, key = np.concatenate(all_full), np.concatenate(keys)
    assert 10 <= key.sum() == found.key_tokens < key.size == found.tokens
    assert found == pytest.approx(math.exp(-full[key].mean()), rel=1e-4)
    assert found.perplexity == pytest.approx(math.exp(-full.mean()), rel=1e-4)
    assert [tuple(np.flatnonzero(k) + SHORT) for k in keys] == list(found.keys)
    assert found.interval[0] < found < found.interval[1]


def test_another_model_may_say_which_tokens_are_key(model):
    documents = written(model)
    sizes = {"length": LENGTH, "short": SHORT, "block": BLOCK}
    own = longrope.long_perplexity(model, documents, **sizes)
    longrope.apply(model, tiny_models.factors("yarn"))
    judged = longrope.long_perplexity(model, documents, **sizes, evaluator=build())
    again = longrope.long_perplexity(model, documents, **sizes, keys=own.keys)
    assert judged.keys == own.keys == again.keys
    assert judged == again != own


def test_windows_do_not_overlap_and_samples_are_some_of_them(model):
    documents = written(model)
    joined = [torch.cat([*documents, documents[0][:50]])]
    sizes = {"length": LENGTH, "short": SHORT, "block": BLOCK}
    apart, together = (longrope.long_perplexity(model, d, **sizes) for d in (documents, joined))
    assert apart == pytest.approx(together, rel=1e-5) and apart.keys == together.keys
    some = longrope.long_perplexity(model, documents, **sizes, samples=2, seed=3)
    assert len(some.keys) == 2 and set(some.keys) < set(apart.keys)


def test_chunks_change_nothing_and_tiers_work(model, monkeypatch):
    documents = written(model)
    sizes = {"length": LENGTH, "short": SHORT, "block": BLOCK}
    longrope.apply(model, tiny_models.factors("pi").ladder())
    keys = [range(SHORT, LENGTH)] * 3
    whole = longrope.long_perplexity(model, documents, **sizes, keys=keys)
    monkeypatch.setattr(memory, "CPU_TOKENS_PER_BATCH", 16)
    monkeypatch.setattr(memory, "LEAST_CHUNK", 16)
    assert longrope.long_perplexity(model, documents, **sizes, keys=keys) == pytest.approx(
        whole, rel=1e-4
    )
    assert whole == pytest.approx(whole.perplexity)


def test_the_defaults_are_the_papers_for_a_large_window(monkeypatch):
    model = build(max_position_embeddings=64)
    seen = []
    monkeypatch.setattr(module, "_full", lambda model, windows: seen.append(windows) or 1 / 0)
    for short, expected in ((None, (64, 16)), (80, (80, 20))):
        with pytest.raises(ZeroDivisionError):
            longrope.long_perplexity(model, copies(), length=LENGTH, short=short)
        assert seen[-1][2:] == expected
    with pytest.raises(ZeroDivisionError):
        longrope.long_perplexity(model, copies(1, 9000), length=9000, short=4096)
    assert seen[-1][2:] == (4096, 1024)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"length": SHORT}, "length: expected more tokens than the short context of 32, got 32"),
        ({"length": 101}, "documents[0]: "),
        ({"short": 0}, "short: expected an integer of at least 1"),
        ({"block": 0}, "block: expected an integer of at least 1"),
        (
            {"evaluator": build(vocab_size=32)},
            "evaluator: expected a model with the same tokenizer",
        ),
        ({"samples": 4}, "samples: expected at most 3 windows, got 4"),
        ({"keys": 3}, "keys: expected the places of each window, got int"),
        ({"keys": [[40.5], [50], []]}, "keys: expected an integer"),
        ({"keys": [[40]]}, "keys: expected those of 3 windows, got 1"),
        ({"keys": [[40], [31], [50]]}, "keys: expected places from 32 to 99, got 31 to 31"),
        ({"keys": [[40], [50], []]}, "documents: expected at least 10 key tokens, got 2 among 204"),
    ],
)
def test_refusals_are_one_sentence(model, change, message):
    asked = {"length": LENGTH, "short": SHORT} | change
    with pytest.raises(ValueError) as refused:
        longrope.long_perplexity(model, copies(), **asked)
    assert str(refused.value).startswith(message) and "\n" not in str(refused.value)
