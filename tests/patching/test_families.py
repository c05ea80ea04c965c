"""Every family of the registry, on a tiny random model: what a row must pass to be admitted."""

from __future__ import annotations

import pytest
import torch
import transformers
from support.tiny_models import ORIGINAL, ROTARY_DIM, TARGET, rope_arguments, tokens
from transformers import AutoConfig, AutoModelForCausalLM

import longrope
from longrope.patching import FAMILIES, SUPPORTED_MODEL_TYPES
from longrope.patching.attention import has_kernel_attention, kernel_attention
from longrope.patching.mlp import inplace_mlps

pytestmark = pytest.mark.usefixtures("one_thread")

VERSION_5 = int(transformers.__version__.split(".")[0]) >= 5

SMALL = {
    "vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": ORIGINAL, "initializer_range": 0.2, "pad_token_id": 0,
    "bos_token_id": None, "eos_token_id": None,
}  # fmt: skip
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
#: What a family asks for beside the small sizes. Layers that slide are among layers that do not.
EXTRA = {
    "phi3": {"head_dim": None, "original_max_position_embeddings": ORIGINAL},
    # transformers 4 leaves the soft cap out of its SDPA.
    "gemma2": {
        "sliding_window": 16, "query_pre_attn_scalar": 16, "attn_implementation": "eager",
    },
    "gemma3_text": {
        "sliding_window": 16, "query_pre_attn_scalar": 16,
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
#: Rotary dimensions, where they are not all of the head's.
PARTIAL = {"gpt_neox": 0.25, "phi3": 0.5}


def build(model_type, **scaling):
    """Return a tiny model of a family whose theta is 10000."""
    partial = PARTIAL.get(model_type)
    rope = rope_arguments(partial_rotary_factor=partial, **scaling)
    if model_type == "gpt_neox" and not VERSION_5:
        rope |= {"rotary_pct": partial, "rotary_emb_base": 10000}
    if model_type in ("gemma3_text", "olmo3") and VERSION_5:
        kinds = ("full_attention", "sliding_attention")
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        rope = {"rope_parameters": {kinds[0]: rope["rope_parameters"], kinds[1]: plain}}
    settings = SMALL | rope | EXTRA.get(model_type, {})
    settings = {k: v for k, v in settings.items() if v is not None or k.endswith("token_id")
                or k == "sliding_window"}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, **settings)
        return AutoModelForCausalLM.from_config(config).eval()


def sizes(model_type, target=TARGET):
    rotary_dim = int(ROTARY_DIM * PARTIAL.get(model_type, 1))
    return {"original_length": ORIGINAL, "target_length": target, "rotary_dim": rotary_dim}


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
    assert has_kernel_attention(model)
    with kernel_attention(model), inplace_mlps(model):
        assert apart(logits(model, ids), expected) < 1e-3 * expected.abs().max()


def test_every_family_is_a_row():
    assert len(SUPPORTED_MODEL_TYPES) == len(set(SUPPORTED_MODEL_TYPES))
    assert all(family.name and family.model_types for family in FAMILIES)
