"""Factors by row: a population in one forward pass, and gradients for the factors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.tiny_models import ROTARY_DIM, build, factors, tokens

import longrope
from longrope.patching import embedding, rotary_of, rows

pytestmark = pytest.mark.usefixtures("one_thread")

POPULATION = [
    factors("none"),
    factors("pi", start_tokens=3),
    factors("ntk", attention_factor=1.2),
    factors("yarn", start_tokens=16),
]


@pytest.fixture(params=["kernels", "tables"])
def path(request, monkeypatch):
    """Run with ops.rope, and as on a device whose kernels are not built."""
    if request.param == "tables":
        monkeypatch.setattr(embedding, "DEVICES_WITH_KERNELS", ())


def stacked(population):
    return (
        torch.from_numpy(np.stack([f.inv_freq() for f in population])),
        torch.tensor([f.start_tokens for f in population]),
        torch.tensor([f.attention_factor for f in population], dtype=torch.float64),
    )


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2"])
@torch.no_grad()
def test_rows_equal_one_by_one(model_type, path):
    ids = tokens(1, 48).expand(len(POPULATION), -1)
    model = build(model_type)
    with rows(model, *stacked(POPULATION)):
        together = model(ids).logits
    for row, candidate in enumerate(POPULATION):
        alone = longrope.apply(model, candidate)(ids[:1]).logits[0]
        torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)
        longrope.remove(model)
    assert (together[0] - together[1]).abs().max() > 0.1


@torch.no_grad()
def test_one_row_serves_all(path):
    ids = tokens(3, 40)
    model = build()
    expected = longrope.apply(model, POPULATION[3])(ids).logits
    inv_freq, starts, attention = (t[3:] for t in stacked(POPULATION))
    for setting in ((inv_freq, starts, attention), (inv_freq[0], starts[0], attention[0]),
                    (inv_freq, int(starts), float(attention)),
                    (inv_freq.expand(3, -1), starts, attention)):  # fmt: skip
        with rows(model, *setting):
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_what_was_before_comes_back():
    ids = tokens(len(POPULATION), 40)
    model = build()
    plain = model(ids).logits
    with pytest.raises(RuntimeError, match="in the block"), rows(model, *stacked(POPULATION)):
        raise RuntimeError("in the block")
    assert torch.equal(model(ids).logits, plain)
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"

    longrope.apply(model, [factors("yarn"), factors("none", target=32)], "row")
    applied = model(ids).logits
    with rows(model, *stacked(POPULATION)):
        outer = model(ids).logits
        with rows(model, stacked(POPULATION)[0][:1]):
            assert not torch.equal(model(ids).logits, outer)
        assert torch.equal(model(ids).logits, outer)
    assert torch.equal(model(ids).logits, applied)


@torch.no_grad()
def test_set_rows_and_clear_rows():
    ids = tokens(len(POPULATION), 40)
    model = longrope.apply(build(), factors("pi"))
    applied = model(ids).logits
    with rows(model, *stacked(POPULATION)):
        expected = model(ids).logits
    rotary_of(model).set_rows(*stacked(POPULATION))
    assert torch.equal(model(ids).logits, expected)
    rotary_of(model).clear_rows()
    assert torch.equal(model(ids).logits, applied)


@torch.no_grad()
def test_rows_with_a_cache():
    ids = tokens(len(POPULATION), 40)
    model = build()
    with rows(model, *stacked(POPULATION)):
        full = model(ids).logits
        first = model(ids[:, :25], use_cache=True)
        second = model(ids[:, 25:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(second, full[:, 25:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [1, 3])
def test_gradients_against_finite_differences(count, path):
    """d loss / d inv_freq and d loss / d attention_factor, in float64."""
    model = build(dtype=torch.float64).requires_grad_(False)
    ids = tokens(3, 20)
    inv_freq, starts, attention = (t[1 : 1 + count].clone() for t in stacked(POPULATION))

    def loss(inv_freq, attention):
        with rows(model, inv_freq, starts, attention):
            return model(ids, labels=ids).loss

    inputs = (inv_freq.requires_grad_(), attention.requires_grad_())
    gradients = torch.autograd.grad(loss(*inputs), inputs)
    # transformers' RMSNorm and loss work in float32, which bounds how fine a step can be.
    step = 1e-3
    for which, gradient in enumerate(gradients):
        direction, shifted = torch.randn_like(gradient), []
        for sign in (1, -1):
            moved = [t.detach() for t in inputs]
            moved[which] = moved[which] + sign * step * direction
            shifted.append(loss(*moved).item())
        numeric = (shifted[0] - shifted[1]) / (2 * step)
        assert gradient.abs().max() > 1e-3
        assert (gradient * direction).sum().item() == pytest.approx(numeric, rel=2e-2)


def test_gradients_reach_frozen_bfloat16_and_checkpointed_models():
    ids = tokens(len(POPULATION), 20)
    inv_freq, starts, attention = stacked(POPULATION)
    found = {}
    for name in ("float32", "bfloat16", "checkpointed"):
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
        model = build(dtype=dtype).requires_grad_(False)
        if name == "checkpointed":
            model.train()
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        leaves = (inv_freq.clone().requires_grad_(), attention.clone().requires_grad_())
        with rows(model, leaves[0], starts, leaves[1]):
            model(ids, labels=ids).loss.backward()
        found[name] = [leaf.grad for leaf in leaves]
    for which in range(2):
        exact, checkpointed, rough = (
            found[name][which] for name in ("float32", "checkpointed", "bfloat16")
        )
        assert exact.dtype == torch.float64
        torch.testing.assert_close(checkpointed, exact, rtol=1e-4, atol=1e-5)
        cosine = torch.nn.functional.cosine_similarity(rough.flatten(), exact.flatten(), dim=0)
        assert cosine > 0.9


@pytest.mark.parametrize(
    "setting, message",
    [
        ((torch.ones(4, 5),), r"inv_freq: expected \[8\] or \[B, 8\], got \[4, 5\]"),
        ((torch.ones(2, 2, 8),), r"inv_freq: expected \[8\] or \[B, 8\], got \[2, 2, 8\]"),
        ((torch.ones(4, 8), torch.zeros(2, 2)), r"start_tokens: expected one value or \[B\]"),
        ((torch.ones(4, 8), 0, torch.ones(3)), "expected the same number of rows .* 4, 1 and 3"),
    ],
)
def test_wrong_shapes_are_refused(setting, message):
    model = build()
    with pytest.raises(ValueError, match=message), rows(model, *setting):
        pass
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"


def test_wrong_batch_is_refused():
    model = build()
    inv_freq = torch.ones(4, ROTARY_DIM // 2, dtype=torch.float64)
    with (
        rows(model, inv_freq),
        pytest.raises(ValueError, match="one for each of the 3 rows of the batch, got 4"),
    ):
        model(tokens(3, 8))
