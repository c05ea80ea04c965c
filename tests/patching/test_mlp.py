"""A model's gated layers in less memory inside a block, to the bit what they are outside."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import CONFIGS, build, tokens

from longrope.patching.mlp import inplace_mlps

pytestmark = pytest.mark.usefixtures("one_thread")


def products(model, ids):
    """Return the logits, and where the products of the gated layers lie among their gates."""
    gates, inputs = [], []
    hooks = [
        hook
        for layer in model.model.layers
        for hook in (
            layer.mlp.gate_proj.register_forward_hook(lambda m, a, out: gates.append(out)),
            layer.mlp.down_proj.register_forward_pre_hook(lambda m, a: inputs.append(a[0])),
        )
    ]
    out = model(ids).logits
    for hook in hooks:
        hook.remove()
    return out, [g.data_ptr() == i.data_ptr() for g, i in zip(gates, inputs, strict=True)]


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_in_the_gates_memory(kind, dtype):
    model, ids = build(kind, dtype=dtype), tokens(2, 40)
    with torch.no_grad():
        expected, shared = products(model, ids)
        assert shared == [False, False]
        with inplace_mlps(model):
            actual, shared = products(model, ids)
        assert shared == [True, True]
        assert torch.equal(actual, expected)
        assert products(model, ids)[1] == [False, False]


def test_gradients_need_the_gates():
    model, ids = build(), tokens(1, 20)
    model(ids).logits.sum().backward()
    expected = model.model.layers[0].mlp.gate_proj.weight.grad.clone()
    model.zero_grad()
    with inplace_mlps(model):
        model(ids).logits.sum().backward()
    assert torch.equal(model.model.layers[0].mlp.gate_proj.weight.grad, expected)


def test_what_is_not_known_is_left_alone():
    other = build(hidden_act="gelu")
    with inplace_mlps(other), torch.no_grad():
        assert products(other, tokens(1, 20))[1] == [False, False]
    model = build()
    mine = model.model.layers[0].mlp.forward = lambda x: x
    with pytest.raises(KeyboardInterrupt), inplace_mlps(model):
        assert model.model.layers[0].mlp.forward is mine
        raise KeyboardInterrupt
    assert model.model.layers[0].mlp.forward is mine
    assert "forward" not in model.model.layers[1].mlp.__dict__
    with inplace_mlps(torch.nn.Linear(2, 2)):
        pass
