"""The gradient with respect to rescale factors, and the model as it was afterwards."""

import contextlib
import math

import numpy as np
import pytest
import torch
from support import tiny_models

import longrope
from longrope import ops
from longrope.evaluation.memory import BackwardPlan
from longrope.factor_search import gradient as gradient_module
from longrope.factor_search.descent import Point
from longrope.factor_search.gradient import GradientEvaluator, checkpointing_layers

pytestmark = pytest.mark.usefixtures("one_thread")
WHOLE, LAYERS, CHUNKS = BackwardPlan(), BackwardPlan(True), BackwardPlan(chunk=20)
every_plan = pytest.mark.parametrize("plan", [WHOLE, LAYERS, CHUNKS])


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
    nll, _ = GradientEvaluator(model, factors.base_inv_freq())(point, 4, windows)
    longrope.apply(model, factors.replace(start_tokens=4))
    expected = longrope.perplexity(model, list(windows), length=48, stride=48)
    assert math.exp(nll) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_is_the_slope(model, factors, point, windows):
    # transformers normalises in float32 whatever the dtype of the model: hence the tolerance.
    loss = GradientEvaluator(model.double(), factors.base_inv_freq())
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
    plain = GradientEvaluator(model, factors.base_inv_freq())(point, 2, windows)
    again = GradientEvaluator(model, factors.base_inv_freq(), LAYERS)(point, 2, windows)
    assert plain[0] == again[0]
    assert (plain[1] == again[1]).all()


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2"])
@pytest.mark.parametrize("last_tokens", [None, 1, 9, 30])
@pytest.mark.parametrize("chunk", [1, 16, 46, 47])  # 47 tokens predict one
def test_chunks_give_the_gradient_of_the_whole_window(kind, last_tokens, chunk):
    extra = {
        "llama": {},
        "mistral": {"sliding_window": 24},
        "qwen2": {"sliding_window": 24, "use_sliding_window": True, "max_window_layers": 1},
    }[kind]
    model = tiny_models.build(kind, **extra)
    factors = tiny_models.factors(target=48)
    point = Point(np.log(factors.lambdas), factors.attention_factor)
    torch.manual_seed(0)
    windows = tiny_models.tokens(2, 48)

    def measure(plan):
        return GradientEvaluator(model, factors.base_inv_freq(), plan, last_tokens)(
            point, 3, windows
        )

    nll, gradient = measure(WHOLE)
    cut_nll, cut_gradient = measure(BackwardPlan(chunk=chunk))
    assert cut_nll == pytest.approx(nll, rel=1e-6)
    assert cut_gradient == pytest.approx(gradient, rel=1e-4, abs=1e-4 * np.abs(gradient).max())
    assert np.abs(gradient).min() > 1e-5


def test_chunks_in_bfloat16_are_as_good_as_whole_windows():
    model, factors = tiny_models.build(), tiny_models.factors()
    point = Point(np.log(factors.lambdas), factors.attention_factor)
    torch.manual_seed(0)
    windows = tiny_models.tokens(4)

    def measure(plan):
        return GradientEvaluator(model, factors.base_inv_freq(), plan)(point, 0, windows)[1]

    exact = measure(WHOLE)
    model.bfloat16()
    whole, cut = (np.linalg.norm(measure(plan) - exact) for plan in (WHOLE, BackwardPlan(chunk=8)))
    assert cut < 1.5 * whole + 0.01 * np.linalg.norm(exact)


def test_chunks_keep_less():
    model, factors = tiny_models.build(), tiny_models.factors(target=512)
    point = Point(np.log(factors.lambdas), factors.attention_factor)

    def most_alive(plan):
        """The most elements that a backward pass finds kept, over the passes of a window."""
        alive, most = [0], [0]

        class Kept:
            def __init__(self, tensor):
                self.tensor = tensor
                alive[0] += tensor.numel()
                most[0] = max(most[0], alive[0])

            def __del__(self):
                alive[0] -= self.tensor.numel()

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            GradientEvaluator(model, factors.base_inv_freq(), plan)(
                point, 0, tiny_models.tokens(1, 512)
            )
        assert alive[0] == 0  # nothing outlives the call
        return most[0]

    assert most_alive(BackwardPlan(chunk=64)) < most_alive(WHOLE) / 3


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
    _, exact = GradientEvaluator(model, factors.base_inv_freq())(point, 0, windows)
    _, rounded = GradientEvaluator(model.bfloat16(), factors.base_inv_freq())(point, 0, windows)
    cosine = exact @ rounded / np.linalg.norm(exact) / np.linalg.norm(rounded)
    assert cosine > 0.97


@every_plan
def test_the_model_is_left_as_it_was(model, factors, point, windows, plan):
    model.train()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = {name: (p.requires_grad, p.clone()) for name, p in model.named_parameters()}
    loss = GradientEvaluator(model, factors.base_inv_freq(), plan)
    with torch.no_grad():
        loss(point, 0, windows)
    assert model.training
    for name, p in model.named_parameters():
        assert p.grad is None
        assert (p.requires_grad, True) == (before[name][0], torch.equal(p, before[name][1]))
    assert not [layer for layer in model.model.layers if "forward" in vars(layer)]


@every_plan
def test_an_exception_leaves_the_model_as_it_was(model, factors, point, plan):
    loss = GradientEvaluator(model, factors.base_inv_freq(), plan)
    with pytest.raises(IndexError):
        loss(point, 0, torch.full((1, 48), 1000))
    assert not [layer for layer in model.model.layers if "forward" in vars(layer)]
    assert all(p.requires_grad for p in model.parameters())
    assert type(model.model.rotary_emb).__name__ == "LlamaRotaryEmbedding"


@pytest.mark.parametrize("plan", [WHOLE, LAYERS])
def test_the_kernels_attention_gives_the_gradient_of_the_models_own(
    model, factors, point, windows, plan, monkeypatch
):
    calls = []

    def counted(*args, **options):
        calls.append(model.config._attn_implementation)
        return attention(*args, **options)

    attention = ops.attention
    monkeypatch.setattr(ops, "attention", counted)
    loss = GradientEvaluator(model, factors.base_inv_freq(), plan)
    nll, gradient = loss(point, 4, windows)
    # The layers run again in the backward pass, by the same function.
    passes = len(windows) * (2 if plan is LAYERS else 1)
    assert calls == ["longrope"] * passes * model.config.num_hidden_layers
    assert model.config._attn_implementation == "sdpa"
    monkeypatch.setattr(gradient_module, "kernel_attention", lambda model: contextlib.nullcontext())
    calls.clear()
    expected, own = loss(point, 4, windows)
    assert not calls
    assert nll == pytest.approx(expected, abs=1e-5)
    assert gradient == pytest.approx(own, rel=1e-3, abs=1e-5)
    assert np.abs(own).min() > 1e-4
