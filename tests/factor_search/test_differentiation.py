"""The gradient with respect to rescale factors, and the model as it was afterwards."""

import contextlib
import math

import numpy as np
import pytest
import torch

import longrope
from longrope import ops
from longrope.factor_search import differentiation
from longrope.factor_search.differentiation import (
    LossGradient,
    checkpointing_layers,
    needs_checkpointing,
)
from longrope.factor_search.gradient import Point

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def factors():
    return longrope.RescaleFactors.yarn(original_length=16, target_length=48, rotary_dim=16)


@pytest.fixture
def point(factors):
    return Point(np.log(factors.lambdas), factors.attention_factor)


@pytest.fixture
def windows(documents):
    return torch.stack([d[:48] for d in documents[:3]])


def test_the_loss_is_that_of_the_factors(model, factors, point, windows):
    nll, _ = LossGradient(model, factors.base_inv_freq())(point, 4, windows)
    longrope.apply(model, factors.replace(start_tokens=4))
    expected = longrope.perplexity(model, list(windows), length=48, stride=48)
    assert math.exp(nll) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_slope(model, factors, point, windows):
    # transformers normalises in float32 whatever the dtype of the model: hence the tolerance.
    loss = LossGradient(model.double(), factors.base_inv_freq())
    _, gradient = loss(point, 2, windows)
    assert np.abs(gradient).min() > 0
    for index in range(9):
        step = np.zeros(9)
        step[index] = 1e-4
        ahead, behind = (
            loss(
                Point(
                    point.log_lambdas + sign * step[:8],
                    point.attention_factor * math.exp(sign * step[8]),
                ),
                2,
                windows,
            )[0]
            for sign in (1, -1)
        )
        assert (ahead - behind) / 2e-4 == pytest.approx(gradient[index], rel=1e-2, abs=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checkpointing_changes_nothing(model, factors, point, windows, dtype):
    model = model.to(dtype)
    plain = LossGradient(model, factors.base_inv_freq())(point, 2, windows)
    again = LossGradient(model, factors.base_inv_freq(), True)(point, 2, windows)
    assert plain[0] == again[0]
    assert (plain[1] == again[1]).all()


def test_checkpointing_keeps_less(model, documents):
    def kept():
        sizes = []

        def pack(tensor):
            sizes.append(tensor.numel())
            return tensor

        embedded = model.model.embed_tokens(documents[0][None]).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model.model(inputs_embeds=embedded, use_cache=False)
        return sum(sizes)

    before = kept()
    with checkpointing_layers(model):
        assert kept() < before / 3
    assert kept() == before


def test_bf16_weights_give_the_gradient_of_fp32_ones(model, factors, point, windows):
    _, exact = LossGradient(model, factors.base_inv_freq())(point, 0, windows)
    _, rounded = LossGradient(model.bfloat16(), factors.base_inv_freq())(point, 0, windows)
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert cosine > 0.97


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_model_is_left_as_it_was(model, factors, point, windows, activation_checkpointing):
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    loss = LossGradient(model, factors.base_inv_freq(), activation_checkpointing)
    with torch.no_grad():
        loss(point, 0, windows)
    assert model.training
    for name, p in model.named_parameters():
        assert p.grad is None
        assert (p.requires_grad, True) == (before[name][0], torch.equal(p, before[name][1]))
    assert not [layer for layer in model.model.layers if "forward" in vars(layer)]


def test_an_exception_leaves_the_model_as_it_was(model, factors, point):
    loss = LossGradient(model, factors.base_inv_freq(), True)
    with pytest.raises(IndexError):
        loss(point, 0, torch.full((1, 48), 1000))
    assert not [layer for layer in model.model.layers if "forward" in vars(layer)]
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"


def test_checkpointing_is_asked_for_where_memory_is_short(model, monkeypatch):
    free = "longrope.factor_search.differentiation.free_memory"
    monkeypatch.setattr(free, lambda device: 1 << 30)
    assert not needs_checkpointing(model, 48)
    assert needs_checkpointing(model, 1 << 20)
    monkeypatch.setattr(free, lambda device: None)
    assert not needs_checkpointing(model, 1 << 20)


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_kernels_attention_gives_the_gradient_of_the_models_own(
    model, factors, point, windows, activation_checkpointing, monkeypatch
):
    calls = []

    def counted(*args, **options):
        calls.append(model.config._attn_implementation)
        return attention(*args, **options)

    attention = ops.attention
    monkeypatch.setattr(ops, "attention", counted)
    loss = LossGradient(model, factors.base_inv_freq(), activation_checkpointing)
    nll, gradient = loss(point, 4, windows)
    # The layers run again in the backward pass, by the same function.
    passes = len(windows) * (2 if activation_checkpointing else 1)
    assert calls == ["longrope"] * passes * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(differentiation, "kernel_attention", lambda model: contextlib.nullcontext())
    calls.clear()
    expected, own = loss(point, 4, windows)
    assert not calls
    assert nll == pytest.approx(expected, abs=1e-5)
    assert gradient == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert np.abs(own).min() > 1e-4
