"""Every family of the registry, on a tiny random model: what a row must pass to be admitted."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.families import VERSION_5, build, sizes
from support.tiny_models import ORIGINAL, TARGET, tokens

import longrope
from longrope.patching import FAMILIES, SUPPORTED_MODEL_TYPES
from longrope.patching.attention import has_kernel_attention, kernel_attention
from longrope.patching.families import family_of
from longrope.patching.mlp import inplace_mlps

pytestmark = pytest.mark.usefixtures("one_thread")


@torch.no_grad()
def logits(model, ids, **inputs):
    return model(ids, use_cache=False, **inputs).logits


def apart(actual, expected):
    return (actual - expected).abs().max().item()


@pytest.fixture(params=SUPPORTED_MODEL_TYPES)
def family(request):
    needed = next(family.since for family in FAMILIES if request.param in family.model_types)
    if needed > int(transformers.__version__.split(".")[0]):
        with pytest.raises(ValueError, match=f"expected transformers {needed} or newer"):
            longrope.apply(build(request.param), longrope.RescaleFactors.pi(**sizes("llama")))
        pytest.skip(f"{request.param} needs transformers {needed}")
    return request.param


def test_settings(family):
    settings = longrope.rope_settings(build(family))
    assert settings.rope_theta == 10000
    assert settings.lengths(TARGET) == sizes(family) | {"rope_theta": 10000.0}
    assert (settings.loaded.lambdas == 1).all()


def test_none_is_the_plain_model(family):
    model, ids = build(family), tokens(2, 60)
    expected = logits(model, ids)
    longrope.apply(model, longrope.RescaleFactors.none(**sizes(family)))
    assert apart(logits(model, ids), expected) < 1e-3 * expected.abs().max()


@pytest.mark.parametrize("rope_type", ["yarn", "longrope"])
def test_a_scaling_of_transformers_is_ours(family, rope_type):
    """The model's own scaling for the target gives what the same factors give when applied."""
    yarn = longrope.RescaleFactors.yarn(**sizes(family))
    scaling = {"rope_type": "yarn", "factor": TARGET / ORIGINAL}
    if rope_type == "longrope":
        factors = yarn.lambdas.tolist()
        scaling |= {"rope_type": "longrope", "short_factor": factors, "long_factor": factors,
                    "attention_factor": yarn.attention_factor}  # fmt: skip
    scaling["original_max_position_embeddings"] = ORIGINAL
    if family == "phi3" and rope_type == "yarn":
        pytest.skip("Phi-3's configuration takes no yarn")
    if family in ("olmo2", "phi3") and not VERSION_5:
        pytest.skip("this configuration of transformers 4 takes no scaling of this form")
    own, ids = build(family, **scaling), tokens(2, 100)
    assert longrope.rope_settings(own).original_length == ORIGINAL
    loaded = longrope.rope_settings(own).loaded
    torch.testing.assert_close(loaded.inv_freq(), yarn.inv_freq(), rtol=1e-5, atol=0)
    assert loaded.attention_factor == pytest.approx(yarn.attention_factor)
    model = longrope.apply(build(family), yarn)
    assert apart(logits(model, ids), logits(own, ids)) < 2e-3 * logits(own, ids).abs().max()


def test_factors_bite_and_gradients_flow(family):
    model, ids = build(family), tokens(2, 60)
    expected = logits(model, ids)
    longrope.apply(model, longrope.RescaleFactors.pi(**sizes(family)))
    assert apart(logits(model, ids), expected) > 1e-3
    model(ids, labels=ids, use_cache=False).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    longrope.remove(model)
    assert torch.equal(logits(model, ids), expected)


def test_tiers_by_position(family):
    """The first window is the plain model's, and neither cuts nor generation see a crossing."""
    model, ids = build(family), tokens(2, 90)
    if not family_of(model).tiers:
        with pytest.raises(ValueError, match="expected a family whose attention tiers by position"):
            longrope.apply(model, longrope.RescaleFactors.yarn(**sizes(family)).ladder())
        pytest.skip(f"{family} has no tiers by position")
    window = logits(model, ids[:, :ORIGINAL])
    plain = logits(model, ids)
    longrope.apply(model, longrope.RescaleFactors.yarn(**sizes(family)).ladder())
    assert torch.equal(logits(model, ids[:, :ORIGINAL]), window)
    expected = logits(model, ids)
    assert apart(expected, plain) > 1e-3
    noise = 2e-4 * expected.abs().max().item()
    assert apart(expected[:, :ORIGINAL], window) < noise
    for cuts in ([50, 40], [30, 1, 1, 1, 57]):
        cache, start = None, 0
        for count in cuts:
            with torch.no_grad():
                out = model(ids[:, start : start + count], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            assert apart(out.logits, expected[:, start : start + count]) < noise
            start += count
    made = model.generate(ids[:1, :28], max_new_tokens=45, do_sample=False)
    with torch.no_grad():
        again = model(made[:, :-1], use_cache=False).logits[0, 27:]
    best = again.max(-1).values
    assert (best - again.gather(-1, made[0, 28:, None])[:, 0] < noise).all()


def test_tiers_by_position_with_padding(family):
    model, ids = build(family), tokens(1, 80)
    if not family_of(model).tiers:
        pytest.skip(f"{family} has no tiers by position")
    longrope.apply(model, longrope.RescaleFactors.yarn(**sizes(family)).ladder())
    expected = logits(model, ids)
    batch = torch.cat([torch.zeros(1, 10, dtype=torch.int64), ids], 1).repeat(2, 1)
    batch[1] = tokens(1, 90)
    mask = torch.ones_like(batch)
    mask[0, :10] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    actual = logits(model, batch, attention_mask=mask, position_ids=positions)[:1, 10:]
    assert apart(actual, expected) < 1e-3 * expected.abs().max()


def test_our_attention_and_gated_layers(family):
    model, ids = build(family), tokens(2, 60)
    expected = logits(model, ids)
    assert has_kernel_attention(model) == family_of(model).kernels
    with kernel_attention(model), inplace_mlps(model):
        assert apart(logits(model, ids), expected) < 1e-3 * expected.abs().max()


def test_every_family_is_a_row():
    assert len(SUPPORTED_MODEL_TYPES) == len(set(SUPPORTED_MODEL_TYPES))
    assert all(family.name and family.model_types for family in FAMILIES)
