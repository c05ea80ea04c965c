"""Factors by layer and head inside models: each layer and head turns by its own, in every path."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from support import families
from support.tier_rule import reference
from support.tiny_models import ORIGINAL, build, factors, tokens
from torch import nn

import longrope
from longrope.patching import FAMILIES, embedding, rows, tier_attention
from longrope.patching.families import decoder, family_of
from longrope.patching.layers import layers_and_heads
from longrope.patching.ranges import range_cache, ranges

pytestmark = pytest.mark.usefixtures("one_thread")


def by_head(shared, layers=2, heads=2):
    """Return factors whose layers and heads differ."""
    random = np.random.default_rng(3)
    spread = shared.spread(layers, heads)
    return spread.replace(
        lambdas=spread.lambdas * random.uniform(1, 2, spread.lambdas.shape),
        attention_factor=spread.attention_factor * random.uniform(1, 1.3, spread.heads),
    )


OWN = by_head(factors("yarn", attention_factor=1.1, start_tokens=3))
EVERY = [OWN, by_head(factors("yarn"), heads=1)]


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def apart(actual, expected):
    return (actual.double() - expected.double()).abs().max().item()


@pytest.fixture(params=["kernels", "tables"])
def path(request, monkeypatch):
    """Run with our kernels, and as on a device where they are not built."""
    if request.param == "tables":
        monkeypatch.setattr(tier_attention, "DEVICES_WITH_KERNELS", ())
        monkeypatch.setattr(embedding, "DEVICES_WITH_KERNELS", ())


@pytest.mark.parametrize("own", EVERY, ids=["heads", "layers"])
@pytest.mark.parametrize("several", ["one set", "tiers"])
def test_every_head_turns_by_its_own(own, several, path):
    model, ids = build(), tokens(2, 100)
    plain = logits(model, ids)
    noise = apart(plain, logits(copy.deepcopy(model).double(), ids))
    tiers = own.ladder() if several == "tiers" else longrope.Tiers([own])
    actual = logits(longrope.apply(model, tiers), ids)
    assert apart(actual, reference(model, ids, tiers)) < 4 * noise
    shared = longrope.Tiers([tier.mean() for tier in tiers])
    assert apart(actual, reference(model, ids, shared)) > 0.05
    assert torch.equal(logits(longrope.remove(model), ids), plain)


@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("rule", ["position", "row"])
def test_equal_factors_are_the_shared_ones(rule, heads):
    """Bit for bit, with a cache that crosses two limits."""
    shared = factors("yarn", attention_factor=1.1).ladder()
    spread = longrope.Tiers([shared[0], *(tier.spread(2, heads) for tier in shared[1:])])
    ids, found = tokens(2, 90), []
    for tiers in (shared, spread):
        model, cache = longrope.apply(build(), tiers, tiers=rule), None
        for part in ids.split([20, 20, 1, 1, 40, 8], 1):
            with torch.no_grad():
                out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    for one, other in zip(found[:6], found[6:], strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", [t for f in FAMILIES for t in f.model_types])
def test_every_family(family):
    """Neither cuts nor generation see a crossing, and what is applied bites."""
    if family not in ("gpt_oss",) and not families.VERSION_5:
        since = next(f.since for f in FAMILIES if family in f.model_types)
        if since > 4:
            pytest.skip(f"{family} needs transformers {since}")
    model, ids = families.build(family), tokens(2, 80)
    shared = longrope.RescaleFactors.yarn(**families.sizes(family))
    own = by_head(shared, *layers_and_heads(decoder(model)))
    of_all = logits(longrope.apply(model, shared), ids)
    assert apart(logits(longrope.apply(model, own), ids), of_all) > 1e-3
    if not family_of(model).tiers:
        return
    longrope.apply(model, own.ladder())
    expected = logits(model, ids)
    noise = 2e-4 * expected.abs().max().item()
    cache, start = None, 0
    for count in [30, 1, 1, 1, 47]:
        with torch.no_grad():
            out = model(ids[:, start : start + count], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        assert apart(out.logits, expected[:, start : start + count]) < noise
        start += count


def test_a_cache_of_unrotated_keys():
    model, ids = build(), tokens(2, 90)
    expected = logits(longrope.apply(model, OWN.ladder()), ids)
    longrope.apply(model, OWN.ladder(), cached_keys="unrotated")
    cache, parts = None, []
    for part in ids.split([30, 1, 1, 40, 18], 1):
        with torch.no_grad():
            out = model(part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert apart(torch.cat(parts, 1), expected) < 2e-4 * expected.abs().max()


def test_a_row_that_grows_into_its_next_tier():
    """The first layer's keys, which depend on nothing else, are those of the new tier."""
    model, ids = longrope.apply(build(), OWN.ladder(), tiers="row"), tokens(1, 60)
    with torch.no_grad():
        cache = model(ids[:, :20], use_cache=True).past_key_values
        cache = model(ids[:, 20:], past_key_values=cache, use_cache=True).past_key_values
        fresh = model(ids, use_cache=True).past_key_values
    torch.testing.assert_close(cache.layers[0].keys, fresh.layers[0].keys, atol=1e-5, rtol=1e-5)


def test_rows_and_ranges_have_gradients():
    """`rows` gives each row factors by layer and head; behind a prefix the same."""
    model, ids = build(), tokens(2, 60)
    inv_freq = torch.from_numpy(np.stack([OWN.inv_freq(), 1.1 * OWN.inv_freq()], 1))
    factor = torch.from_numpy(np.stack([OWN.attention_factor] * 2, 1))
    leaves = inv_freq.requires_grad_(), factor.requires_grad_()
    with rows(model, leaves[0], 0, leaves[1]):
        found = model(ids, use_cache=False).logits
    one = OWN.replace(start_tokens=0)
    expected = logits(longrope.apply(model, one), ids[:1])
    torch.testing.assert_close(found[:1].detach(), expected, atol=1e-4, rtol=1e-4)
    grads = torch.autograd.grad(found[0].square().sum(), leaves)
    assert all((g[:, 0].abs().amax(-1) > 0).all() for g in grads)
    assert all((g[:, 1] == 0).all() for g in grads)

    longrope.remove(model)
    cache = range_cache(model, 60, ORIGINAL)
    with torch.no_grad(), ranges(model) as rotary:
        rotary.turn_by_factors(one)
        for part in (slice(0, 32), slice(32, 60)):
            at = torch.arange(60)[None, part]
            behind = model(ids[:1, part], position_ids=at, past_key_values=cache).logits
    torch.testing.assert_close(behind, expected[:, 32:], atol=1e-4, rtol=1e-4)


def test_compiles_into_one_graph():
    model, ids = longrope.apply(build(), OWN.ladder()), tokens(1, 70)
    expected = logits(model, ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert apart(logits(compiled, ids), expected) < 1e-4 * expected.abs().max()
    single = logits(longrope.apply(model, OWN), ids)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert apart(logits(compiled, ids), single) < 1e-4 * single.abs().max()


def test_checkpointing_and_copies():
    model, ids = longrope.apply(build(), OWN), tokens(1, 50)
    again = copy.deepcopy(model)
    assert torch.equal(logits(again, ids), logits(model, ids))
    longrope.remove(again)
    assert isinstance(decoder(again).rotary_emb, nn.Module)
    assert not any(m._forward_pre_hooks for m in again.modules())
    expected = torch.autograd.grad(
        model(ids, use_cache=False).logits.sin().sum(), model.lm_head.weight
    )
    model.train()
    model.gradient_checkpointing_enable()
    got = torch.autograd.grad(model(ids, use_cache=False).logits.sin().sum(), model.lm_head.weight)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(("layers", "heads"), [(3, 2), (2, 3), (2, 4), (1, 2)])
def test_those_of_another_model_are_refused(layers, heads):
    with pytest.raises(ValueError, match=r"^factors: expected lambdas \[2, 2 or 1, R/2\]"):
        longrope.apply(build(), by_head(factors("yarn"), layers, heads))
