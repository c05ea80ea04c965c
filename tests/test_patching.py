"""longrope.apply and remove on tiny random models, against transformers' own rope types."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

import longrope
from longrope import RescaleFactors

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
ORIGINAL, TARGET = 32, 128


def build(kind="llama", rope=None, dtype=torch.float32, **extra):
    rope = {"rope_type": "default"} if rope is None else rope
    settings = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": ORIGINAL,
        "initializer_range": 0.2,
        "rope_parameters": {"rope_theta": 10000.0} | rope,
        "pad_token_id": 0,
    }
    torch.manual_seed(1)
    config = CONFIGS[kind](**(settings | extra))
    return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def factors(kind="yarn", **extra):
    made = getattr(RescaleFactors, kind)(
        original_length=ORIGINAL, target_length=TARGET, rotary_dim=16
    )
    return made.replace(**extra)


def tokens(batch=2, length=TARGET):
    return torch.randint(1, 64, (batch, length))


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize(
    "kind, rope",
    [
        ("pi", {"rope_type": "linear", "factor": 4.0}),
        ("yarn", {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}),
        ("ntk", {"rope_type": "dynamic", "factor": 1.0}),
    ],
)
def test_equals_transformers_rope_types(model_type, kind, rope):
    ids = tokens()
    with torch.no_grad():
        expected = build(model_type, rope)(ids).logits
        plain = build(model_type)
        unscaled = plain(ids).logits
        actual = longrope.apply(plain, factors(kind))(ids).logits
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    assert (actual - unscaled).abs().max() > 0.1


@pytest.mark.parametrize("model_type", CONFIGS)
def test_remove_restores_every_bit(model_type):
    ids = tokens()
    model = build(model_type)
    config, keys = model.config.to_dict(), list(model.state_dict())
    with torch.no_grad():
        before = model(ids).logits
        assert longrope.apply(model, factors()) is model
        assert list(model.state_dict()) == keys and model.config.to_dict() == config
        assert not torch.equal(model(ids).logits, before)
        assert longrope.remove(model) is model
        torch.testing.assert_close(model(ids).logits, before, rtol=0, atol=0)
    assert list(model.state_dict()) == keys and model.config.to_dict() == config
