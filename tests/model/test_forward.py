"""The forward pass of `LongRoPEModel`: against transformers, in blocks, backwards, by dtype."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.small_model import BASE, WIDTH, build, ids
from torch.utils._python_dispatch import TorchDispatchMode

import longrope
from longrope.model import blocks


@pytest.mark.parametrize("target", [None, 4 * BASE], ids=["base", "tiers"])
@torch.no_grad()
def test_logits_are_those_of_transformers_with_the_tiers(target, one_thread):
    model, tokens = build(target=target), ids()
    theirs = model.llama(tokens).logits
    torch.testing.assert_close(model(tokens), theirs, rtol=1e-4, atol=1e-4)
    embeddings = model.llama.get_input_embeddings()(tokens)
    hidden = model.llama.model(inputs_embeds=embeddings).last_hidden_state
    torch.testing.assert_close(model(embeddings), hidden, rtol=1e-4, atol=1e-4)
    assert torch.equal(model(tokens, output="hidden"), model(embeddings))
    assert torch.equal(model(embeddings, output="logits"), model(tokens))


@torch.no_grad()
def test_any_integer_type_holds_token_ids(one_thread):
    model, tokens = build(), ids()
    expected = model(tokens)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint64):
        assert torch.equal(model(tokens.to(dtype)), expected)


def test_sizes_may_be_of_numpy():
    sizes = (np.int64(size) for size in (16, 2, 1, 32))
    assert longrope.LongRoPEModel(*sizes).llama.config.intermediate_size == 64


def test_the_tiers_matter_where_they_begin(one_thread):
    tokens = ids()
    torch.manual_seed(1)
    plain = build()
    before = plain(tokens)
    after = plain.extend_context(None, 4 * BASE, method="yarn")(tokens)
    assert torch.equal(before[:, :BASE], after[:, :BASE])
    assert (before[:, BASE:] - after[:, BASE:]).abs().max() > 1e-2


def test_what_follows_changes_nothing(one_thread):
    model, tokens = build(target=4 * BASE), ids()
    other = tokens.clone()
    other[:, 3 * BASE :] = ids(length=BASE)
    assert torch.equal(model(tokens)[:, : 3 * BASE], model(other)[:, : 3 * BASE])


@pytest.mark.parametrize("block", [1, 7, 32, 100, 127])
def test_blocks_change_nothing_but_rounding(block, one_thread):
    model, states = build(target=4 * BASE), torch.randn(3, 4 * BASE, WIDTH)
    torch.testing.assert_close(model(states, block=block), model(states), rtol=1e-4, atol=1e-4)


def test_blocks_of_16k_tokens_are_the_whole(one_thread):
    sizes = {"d_model": 32, "n_heads": 2, "n_kv_heads": 1, "num_layers": 2}
    model, states = build(target=16384, base_length=1024, **sizes), torch.randn(1, 16384, 32)
    whole = model(states, block=16384)
    for block in (4096, 2000):
        torch.testing.assert_close(model(states, block=block), whole, rtol=1e-4, atol=1e-4)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a tensor that was allocated inside."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def test_one_layer_of_one_row_is_alive(one_thread, monkeypatch):
    """Keys and values of a layer take the place of those of the one before it."""
    model, length, block = build(target=4 * BASE), 8 * BASE, 16
    states, made = torch.randn(3, length, WIDTH), []
    attention = blocks.ops.attention

    def spy(q, k, v, **arguments):
        made.append((q.shape[0], q.shape[2], k.untyped_storage().data_ptr()))
        return attention(q, k, v, **arguments)

    monkeypatch.setattr(blocks.ops, "attention", spy)
    output = model(states, block=block)
    assert {(rows, tokens) for rows, tokens, _ in made} == {(1, block)}
    by_row = [made[first : first + len(made) // 3] for first in range(0, len(made), len(made) // 3)]
    assert all(len({place for *_, place in row}) == 1 for row in by_row)
    with LargestTensor() as seen:
        model(states, block=block)
    assert seen.elements == output.numel()


def test_short_rows_share_a_pass(one_thread, monkeypatch):
    model, sizes = build(), []
    attention = blocks.ops.attention

    def spy(q, *arguments, **keywords):
        sizes.append(q.shape[0])
        return attention(q, *arguments, **keywords)

    monkeypatch.setattr(blocks.ops, "attention", spy)
    states = torch.randn(5, 8, WIDTH)
    together = model(states, block=16)
    assert sizes == [2, 2, 2, 2, 1, 1]
    torch.testing.assert_close(model(states), together, rtol=1e-4, atol=1e-4)


def test_weights_without_kernels_are_refused():
    with pytest.raises(ValueError, match="device: expected weights on cpu"):
        build().to("meta")(torch.zeros(1, 8, WIDTH))


def test_inputs_stay_as_they_are(one_thread):
    model, states = build(), torch.randn(2, BASE, WIDTH)
    before = states.clone()
    model(states), model(states, output="logits")
    assert torch.equal(states, before)


def test_gradients_are_those_of_transformers(one_thread):
    model, tokens = build(target=4 * BASE).train(), ids()
    labels = tokens.clone()
    labels[0, 5:40] = -100
    model(tokens, labels=labels).loss.backward()
    ours = {name: p.grad.clone() for name, p in model.llama.named_parameters()}
    model.zero_grad()
    theirs = model.llama(tokens, labels=labels).loss
    theirs.backward()
    for name, parameter in model.llama.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    model.eval()
    loss = model(tokens, labels=labels).loss
    assert not loss.requires_grad
    torch.testing.assert_close(loss, theirs.detach(), rtol=1e-5, atol=1e-5)


def test_gradients_of_embeddings_are_recorded_where_they_are_asked_for(one_thread):
    model, states = build(), torch.randn(3, BASE, WIDTH, requires_grad=True)
    assert not model(states.detach()).requires_grad
    recorded = model(states, block=2 * BASE)
    torch.testing.assert_close(recorded, model(states.detach()), rtol=1e-4, atol=1e-4)
    recorded.square().sum().backward()
    assert states.grad.abs().sum() > 0
    with torch.no_grad():
        assert not model(states).requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_dtypes(dtype, one_thread):
    torch.manual_seed(2)
    reference = build(scale=4.0, target=4 * BASE, dtype=torch.float64)
    model = build(scale=4.0, target=4 * BASE, dtype=dtype)
    model.load_state_dict(reference.state_dict())
    reference.load_state_dict(model.state_dict())  # the rounded weights
    states = torch.randn(1, 4 * BASE, WIDTH)
    out, expected = model(states), reference(states.double())
    assert model.dtype == dtype and out.dtype == torch.float32
    tolerance = {torch.bfloat16: 0.1, torch.float16: 0.02, torch.float64: 1e-6}[dtype]
    error = (out - expected).norm() / expected.norm()
    assert error < tolerance
    assert model(ids(1)).dtype == dtype


def test_any_integers_are_token_ids(one_thread):
    model, tokens = build(), ids()
    for kind in (torch.uint8, torch.int32):
        assert torch.equal(model(tokens.to(kind)), model(tokens))


@pytest.mark.parametrize(
    ("inputs", "arguments", "message"),
    [
        ([1, 2], {}, "inputs: expected token ids [B, N] or embeddings [B, N, 64]"),
        (torch.zeros(2, 8, 63), {}, "got float32 [2, 8, 63]"),
        (torch.zeros(2, 8), {}, "got float32 [2, 8]"),
        (torch.zeros(2, 8, dtype=torch.bool), {}, "got bool [2, 8]"),
        (torch.zeros(2, 0, 64), {}, "got float32 [2, 0, 64]"),
        (torch.full((1, 8), 64), {}, "inputs: expected token ids below 64, got 64"),
        (torch.full((1, 8), -1), {}, "inputs: expected token ids below 64, got -1"),
        (torch.zeros(1, 8, 64), {"output": "states"}, "output: expected one of"),
        (torch.zeros(1, 8, 64), {"block": 0}, "block: expected an integer of at least 1, got 0"),
        (ids(1, 8), {"labels": ids(1, 7)}, "labels: expected int64 [1, 8], got int64 [1, 7]"),
        (ids(1, 8), {"labels": torch.full((1, 8), 99)}, "labels: expected token ids below 64"),
    ],
)
def test_bad_inputs(inputs, arguments, message):
    with pytest.raises(ValueError) as caught:
        build()(inputs, **arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"d_model": 0}, "d_model: expected an integer of at least 1, got 0"),
        ({"n_heads": 3}, "n_heads: expected a number that divides d_model"),
        ({"d_model": 60, "n_heads": 4}, "got 4 for d_model 60"),
        ({"d_model": 1024, "n_heads": 2}, "at most 256"),
        ({"n_kv_heads": 3}, "n_kv_heads: expected a divisor of n_heads, 4, got 3"),
        ({"device": "bogus"}, "device: expected one that torch sees, got 'bogus'"),
        ({"theta": -1.0}, "theta: expected a finite number above 1, got -1.0"),
        ({"dtype": torch.int8}, "dtype: expected a torch dtype of float32"),
        ({"base_length": 2.5}, "base_length: expected an integer"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError) as caught:
        build(**arguments)
    assert message in str(caught.value) and "\n" not in str(caught.value)
