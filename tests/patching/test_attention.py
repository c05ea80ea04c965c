"""A model's attention layers by `ops.attention` inside a block, and by their own after it."""

from __future__ import annotations

import pytest
import torch
from support.criterion import assert_as_accurate
from support.tiny_models import CONFIGS, build, tokens
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, StaticCache
from transformers.models.llama import modeling_llama

from longrope import ops
from longrope.patching import attention
from longrope.patching.attention import NAME, has_kernel_attention, kernel_attention
from longrope.patching.window_cache import window_cache

pytestmark = pytest.mark.usefixtures("one_thread")

#: Shorter than the texts here. Qwen2 has it in the layers from the second on.
WINDOW = {"sliding_window": 24}
MODELS = {
    "llama": {},
    "mistral": WINDOW,
    "qwen2": WINDOW | {"use_sliding_window": True, "max_window_layers": 1},
}
assert set(MODELS) == set(CONFIGS)


@torch.no_grad()
def logits(model, ids, **arguments):
    return model(ids, **arguments).logits


def in_chunks(model, ids, sizes, cache):
    """Return the logits of a text that comes in chunks, and the cache that it filled."""
    parts = []
    for part in ids.split(sizes, dim=1):
        with torch.no_grad():
            out = model.model(part, past_key_values=cache, use_cache=True)
            parts.append(model.lm_head(out.last_hidden_state))
    return torch.cat(parts, 1)


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_is_as_accurate_as_the_models_own(kind, dtype):
    ids = tokens(2, 70)
    exact = logits(build(kind, dtype=torch.float64, **MODELS[kind]), ids)
    model = build(kind, dtype=dtype, **MODELS[kind])
    own = logits(model, ids)
    with kernel_attention(model):
        assert_as_accurate(logits(model, ids), own, exact)
    assert torch.equal(logits(model, ids), own)


def test_the_sliding_window_matters_here():
    ids = tokens(1, 70)
    full, sliding = (build("mistral", sliding_window=w) for w in (None, 24))
    assert (logits(full, ids) - logits(sliding, ids)).abs().max() > 0.1


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("make", ["window_cache", "DynamicCache", "DynamicCache of the config"])
def test_with_a_cache(kind, make):
    model, ids = build(kind, **MODELS[kind]), tokens(2, 70)
    cache = {
        "window_cache": lambda: window_cache(model, 70),
        "DynamicCache": DynamicCache,
        "DynamicCache of the config": lambda: DynamicCache(config=model.config),
    }[make]()
    expected = logits(model, ids)
    with kernel_attention(model):
        got = in_chunks(model, ids, [30, 1, 33, 6], cache)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", MODELS)
def test_the_cache_of_a_window_serves_the_models_own_attention(kind):
    model, ids = build(kind, **MODELS[kind]), tokens(2, 70)
    got = in_chunks(model, ids, [30, 1, 33, 6], window_cache(model, 70))
    torch.testing.assert_close(got, logits(model, ids), rtol=1e-4, atol=1e-4)


def test_the_cache_of_a_window_takes_its_memory_once():
    model, ids = build(), tokens(2, 40)
    cache = window_cache(model, 40)
    in_chunks(model, ids[:, :10], [10], cache)
    keys = cache.layers[1].keys
    assert keys.shape[2] == 10
    in_chunks(model, ids[:, 10:], [20, 10], cache)
    assert cache.layers[1].keys.shape[2] == cache.get_seq_length() == 40
    assert cache.layers[1].keys.data_ptr() == keys.data_ptr()
    with pytest.raises(ValueError, match="cache: expected at most 40 tokens, got 41"):
        in_chunks(model, ids[:, :1], [1], cache)


@pytest.mark.parametrize("kind", MODELS)
def test_another_function_in_its_place(kind):
    model, ids = build(kind, **MODELS[kind]), tokens(2, 40)
    calls = []

    def attend(q, k, v, *, causal, window, scale, softcap):
        calls.append((q.shape, k.shape, v.shape, causal, window, scale, softcap))
        return ops.attention(q, k, v, causal, window=window, scale=scale, softcap=softcap) * 0.5

    with kernel_attention(model):
        expected = logits(model, ids)
        with kernel_attention(model, attend):
            assert (logits(model, ids) - expected).abs().max() > 0.1
        assert torch.equal(logits(model, ids), expected)
    windows = {"llama": [None, None], "mistral": [24, 24], "qwen2": [None, 24]}[kind]
    shapes = ((2, 4, 40, 16), (2, 2, 40, 16), (2, 2, 40, 16))
    assert calls == [(*shapes, True, window, 0.25, None) for window in windows]


def test_a_module_in_its_place_does_not_become_part_of_the_model():
    class Attend(torch.nn.Module):
        def forward(self, q, k, v, **options):
            return ops.attention(q, k, v, **options)

    model, ids = build(), tokens(1, 20)
    with kernel_attention(model):
        expected = logits(model, ids)
    modules = list(model.modules())
    with kernel_attention(model, Attend()):
        assert list(model.modules()) == modules
        assert torch.equal(logits(model, ids), expected)


@pytest.mark.parametrize("own", ["sdpa", "eager"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_the_models_own_comes_back_after_an_error(own, error):
    model, ids = build(), tokens(1, 20)
    model.set_attn_implementation(own)
    expected = logits(model, ids)
    before = [dict(layer.self_attn.__dict__) for layer in model.model.layers]
    with pytest.raises(error), kernel_attention(model):
        assert model.config._attn_implementation == NAME
        raise error
    assert model.config._attn_implementation == own
    assert [layer.self_attn.__dict__ for layer in model.model.layers] == before
    assert not model.model._forward_pre_hooks
    assert torch.equal(logits(model, ids), expected)


def test_another_model_keeps_its_own():
    one, other = build(), build()
    with kernel_attention(one):
        assert one.config._attn_implementation == NAME
        assert other.config._attn_implementation == "sdpa"


def test_a_mask_that_hides_something_is_refused():
    model, ids = build(), tokens(2, 20)
    ones = torch.ones_like(ids)
    padded = ones.clone()
    padded[1, :3] = 0
    with kernel_attention(model):
        assert torch.equal(logits(model, ids, attention_mask=ones), logits(model, ids))
        with pytest.raises(ValueError, match=r"attention_mask: .* got 3 hidden of 40"):
            logits(model, ids, attention_mask=padded)
        with pytest.raises(ValueError, match=r"attention_mask: .* got 3 hidden of 40"):
            model(ids, padded)
        with pytest.raises(ValueError, match=r"attention_mask: .* got Tensor \[2, 1, 20, 20\]"):
            logits(model, ids, attention_mask=torch.zeros(2, 1, 20, 20))


def test_a_cache_with_unused_room_and_dropout_are_refused():
    model, ids = build(attention_dropout=0.5), tokens(1, 20)
    with kernel_attention(model):
        with pytest.raises(ValueError, match=r"cache: .* got StaticCache of fixed size"):
            cache = StaticCache(config=model.config, max_cache_len=64)
            logits(model, ids, past_key_values=cache, use_cache=True)
        model.train()
        with pytest.raises(ValueError, match=r"dropout: expected 0 .* got 0.5"):
            logits(model, ids)


def untouched(model):
    with kernel_attention(model):
        return model.config._attn_implementation == "sdpa"


def test_what_the_kernels_do_not_take_keeps_its_own(monkeypatch):
    assert not untouched(build())
    assert has_kernel_attention(build()) and has_kernel_attention(build().model)
    assert untouched(build(head_dim=264))
    assert untouched(build().to("meta"))
    assert untouched(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=1, vocab_size=16)))
    with kernel_attention(torch.nn.Linear(2, 2)):
        pass
    with monkeypatch.context() as patch:
        patch.setattr(attention, "DEVICES_WITH_KERNELS", ())
        assert untouched(build())
    with monkeypatch.context() as patch:
        patch.delattr(modeling_llama, "ALL_ATTENTION_FUNCTIONS")
        assert untouched(build())
