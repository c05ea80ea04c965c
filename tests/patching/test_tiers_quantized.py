"""Quantised caches under tiers by position: they hold keys before their rotation."""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import TARGET, build, factors, tokens
from transformers import Cache
from transformers.cache_utils import QuantizedLayer

import longrope
from longrope.patching.tier_pass import cache_argument

pytestmark = pytest.mark.usefixtures("one_thread")

LADDER = factors("yarn", attention_factor=1.1).ladder()


class RoundingLayer(QuantizedLayer):
    """A quantised layer as a backend makes one; with 0 bits it loses nothing."""

    def _quantize(self, tensor, axis=0):
        if not self.nbits:
            return tensor, torch.ones(())
        scale = tensor.abs().amax(-1, keepdim=True) / (2 ** (self.nbits - 1) - 1)
        return (tensor / scale).round().to(torch.int8), scale

    def _dequantize(self, quantized):
        states, scale = quantized
        return states * scale


def quantized_cache(model, nbits, residual_length=8):
    layers = [
        RoundingLayer(nbits=nbits, residual_length=residual_length)
        for _ in range(model.config.num_hidden_layers)
    ]
    return Cache(layers=layers)


def fed(model, ids, cache, *ends):
    """Return the logits of a text that comes in pieces."""
    name, parts, at = cache_argument(model.model), [], 0
    for end in (*ends, ids.shape[1]):
        parts.append(model(ids[:, at:end], use_cache=True, **{name: cache}).logits)
        at = end
    return torch.cat(parts, 1)


def apart(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.mark.parametrize("cached_keys", ["turned", "unrotated"])
@pytest.mark.parametrize("ends", [(20,), (40, 41, 42), (100,), (10, 70, 71, 120)])
@torch.no_grad()
def test_what_quantises_nothing_changes_nothing(ends, cached_keys):
    model = longrope.apply(build(), LADDER, cached_keys=cached_keys)
    ids = tokens(2)
    whole = model(ids, use_cache=False).logits
    assert apart(fed(model, ids, quantized_cache(model, 0), *ends), whole) < 1e-4


@pytest.mark.parametrize("nbits", [8, 4])
@torch.no_grad()
def test_loses_no_more_than_the_plain_model_does(nbits):
    """Crossings add nothing to what the same bits cost under one rotation."""
    ids, ends = tokens(2), tuple(range(20, TARGET, 20))
    model = build()

    def loss():
        exact = model(ids, use_cache=False).logits
        return apart(fed(model, ids, quantized_cache(model, nbits), *ends), exact)

    plain = loss()
    assert plain > 1e-4  # the quantisation bites
    longrope.apply(model, LADDER)
    assert loss() < 2 * plain


@torch.no_grad()
def test_padding_and_rows():
    model = longrope.apply(build(), LADDER)
    ids = tokens(2, 100)
    mask = torch.ones_like(ids)
    mask[0, :30] = 0
    name, cache = cache_argument(model.model), quantized_cache(model, 0)
    model(ids[:, :80], attention_mask=mask[:, :80], **{name: cache})
    last = model(ids[:, 80:], attention_mask=mask, **{name: cache}).logits
    for row, start in ((0, 30), (1, 0)):
        alone = model(ids[row : row + 1, start:], use_cache=False).logits
        assert apart(last[row : row + 1], alone[:, 80 - start :]) < 1e-4


@torch.no_grad()
def test_generates_across_a_crossing():
    model = longrope.apply(build(), LADDER)
    ids = tokens(1, 60)
    out = model.generate(
        ids, past_key_values=quantized_cache(model, 0), max_new_tokens=20, do_sample=False
    )
    assert torch.equal(out, model.generate(ids, max_new_tokens=20, do_sample=False))


@torch.no_grad()
def test_beams_are_exact_or_refused():
    model = longrope.apply(build(), LADDER)
    ids = tokens(1, 60)
    beams = {"max_new_tokens": 12, "num_beams": 3, "do_sample": False}
    plain_reordering = "_pending_beam_idx" not in vars(RoundingLayer())
    if plain_reordering:
        with pytest.raises(ValueError, match=r"^cache: expected one that is not quantised"):
            model.generate(ids, past_key_values=quantized_cache(model, 0), **beams)
        return
    out = model.generate(ids, past_key_values=quantized_cache(model, 0), **beams)
    assert torch.equal(out, model.generate(ids, **beams))


def test_gradients_take_what_is_held_as_constants():
    model = longrope.apply(build(), LADDER)
    ids = tokens(1, 100)
    grads = []
    for cache in (quantized_cache(model, 0), None):
        with torch.no_grad():
            name = cache_argument(model.model)
            held = model(ids[:, :80], use_cache=True, **({name: cache} if cache else {}))
        held = cache or held.past_key_values
        model.zero_grad()
        model(ids[:, 80:], **{name: held}).logits.square().mean().backward()
        grads.append(model.model.layers[0].self_attn.q_proj.weight.grad.clone())
    assert apart(*grads) < 1e-6 and grads[0].abs().max() > 0


@torch.no_grad()
def test_refusals():
    model = longrope.apply(build(), LADDER)
    ids, cache = tokens(1, 100), quantized_cache(model, 0)
    fed(model, ids, cache, 40)
    for change in (lambda: cache.batch_repeat_interleave(2), lambda: cache.crop(-3),
                   lambda: cache.batch_select_indices(torch.tensor([0]))):  # fmt: skip
        with pytest.raises(ValueError, match=r"^cache: expected one that is not quantised"):
            change()
    other = longrope.apply(build(), factors("pi").ladder())
    with pytest.raises(ValueError, match=r"^cache: expected one that was filled under the tiers"):
        fed(other, ids, cache)
    longrope.remove(model)
    with pytest.raises(ValueError, match=r"^cache: expected one that was filled without tiers"):
        fed(model, ids, cache)
    longrope.apply(model, LADDER)
    cache.reset()
    assert cache.get_seq_length() == 0
    exact = model(ids, use_cache=False).logits
    assert apart(fed(model, ids, cache, 40), exact) < 1e-4


@torch.no_grad()
def test_fp8_of_transformers():
    cache_utils = pytest.importorskip("transformers.cache_utils")
    if not hasattr(cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers has no FP8 cache")
    model, ids = build(), tokens(1)

    def loss():
        cache = cache_utils.QuantizedCache("fp8", model.config)
        return apart(fed(model, ids, cache, 50, 100), model(ids, use_cache=False).logits)

    plain = loss()
    longrope.apply(model, LADDER)
    assert 0 < loss() < 2 * plain
