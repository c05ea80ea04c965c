"""`longrope info FOLDER`: what a model's settings mean, what is wrong, what to do next."""

from __future__ import annotations

import json

import numpy as np
import pytest
import transformers
from support.families import VERSION_5
from transformers import AutoConfig

from longrope.cli.doctor import TOLERANCE, diagnosis, float32_limit
from longrope.patching import rope_settings

TWOS = {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}


def said(folder, **fields):
    """Return what is said of a configuration on disk."""
    base = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0,
        "max_position_embeddings": 256,
    }  # fmt: skip
    stated = {name: value for name, value in (base | fields).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(stated))
    return diagnosis(folder)


def cautions(facts):
    return [line for name, line in facts.items() if name.startswith("caution")]


def test_a_plain_model_is_one_screen_and_names_the_next_step(tmp_path):
    facts = said(tmp_path)
    assert facts["model"] == "llama (a family that is tested: Llama)"
    assert facts["window"] == "256 tokens before scaling, 256 as loaded"
    assert facts["scaling"].startswith('"default", none')
    assert "--target-length 2048" in facts["next"]
    assert cautions(facts) == [] and "attention" not in facts
    assert len(facts) < 12


def test_scalings_say_what_they_do_and_from_which_window(tmp_path):
    facts = said(tmp_path, rope_scaling={"rope_type": "linear", "factor": 4.0})
    assert facts["window"] == "64 tokens before scaling, 256 as loaded"
    assert facts["as loaded"] == "lambda 4, attention factor 1"
    (caution,) = cautions(facts)
    assert "the window before the scaling is taken to be 64" in caution
    facts = said(tmp_path, rope_scaling={"rope_type": "yarn", "factor": 4.0})
    (caution,) = cautions(facts)
    assert caution.startswith("no original_max_position_embeddings below max_position_embeddings")
    named = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
    assert cautions(said(tmp_path, rope_scaling=named)) == []


def test_factors_that_are_missing_or_too_few(tmp_path):
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
    facts = said(tmp_path, original_max_position_embeddings=64, rope_scaling=scaling)
    wrong, switch = cautions(facts)
    assert wrong == "long_factor: expected 8 numbers (rotary_dim / 2), got 7"
    assert "chooses the frequencies for the whole batch by its longest row" in switch


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({}, "every layer sees 64 tokens at most"),
        ({"model_type": "ministral", "layer_types": ["sliding_attention", "full_attention"]},
         "1 of 2 layers see 64 tokens at most, the others all"),
    ],
)  # fmt: skip
def test_sliding_windows(tmp_path, fields, sentence):
    facts = said(tmp_path, **({"model_type": "mistral", "sliding_window": 64} | fields))
    assert facts["attention"].startswith(sentence)


def test_the_position_of_float32_angles_is_the_first_that_is_wrong(tmp_path):
    said(tmp_path)
    settings = rope_settings(AutoConfig.from_pretrained(tmp_path))
    position = float32_limit(settings)
    exact = 10000.0 ** (-np.arange(0, 16, 2) / 16)

    def error(positions):
        rounded = exact.astype(np.float32) * positions[:, None].astype(np.float32)
        return np.abs(rounded - exact * positions[:, None]).max(1)

    assert error(np.array([position])) > TOLERANCE
    assert (error(np.arange(position)) <= TOLERANCE).all()
    assert f"position {position} on" in said(tmp_path)["float32 angles"]


def test_a_configuration_that_transformers_cannot_read(tmp_path):
    """Phi-3 as it was released for 4.3x, and factors of a wrong length, which its class refuses."""
    scaling = {"rope_type": "longrope", "short_factor": [1.0] * 8, "long_factor": [2.0] * 7}
    facts = said(tmp_path, model_type="phi3", original_max_position_embeddings=64, pad_token_id=0,
                 rope_theta=None, rope_scaling=scaling)  # fmt: skip
    unread, wrong, *_ = cautions(facts)
    assert unread.startswith(f"transformers {transformers.__version__} cannot read config.json: ")
    assert wrong == "long_factor: expected 8 numbers (rotary_dim / 2), got 7"
    assert facts["window"] == "64 tokens before scaling, 256 as loaded"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("{", "expected JSON"),
        ("[]", "expected JSON, got something else than an object"),
        ("{}", "expected one that names a model_type"),
        ('{"model_type": "gpt2"}', 'got model_type "gpt2", which has none'),
        ('{"model_type": "unheard-of"}', "rotary position embeddings"),
    ],
)
def test_what_is_no_model_with_rotary_embeddings_is_one_sentence(tmp_path, content, sentence):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=f"^(WHAT|model): .*{sentence}"):
        diagnosis(tmp_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"head_dim": "64"},
        {"num_attention_heads": 0},
        {"layer_types": 3},
        {"num_hidden_layers": None},
    ],
)
def test_settings_of_a_wrong_type_are_no_traceback(tmp_path, fields):
    config = {
        "model_type": "mistral", "hidden_size": 64, "num_attention_heads": 4,
        "num_hidden_layers": 2, "max_position_embeddings": 64, "sliding_window": 32,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | fields))
    try:  # releases of transformers differ in what they refuse
        assert diagnosis(tmp_path)["next"]
    except ValueError as error:
        assert str(error).startswith(("WHAT: ", "model: "))


def test_phi_moe_and_a_family_that_is_not_tested(tmp_path):
    scaling = {"rope_type": "longrope", **TWOS, "short_mscale": 1.0, "long_mscale": 1.2,
               "original_max_position_embeddings": 64}  # fmt: skip
    facts = said(tmp_path, model_type="phimoe", num_local_experts=4, rope_scaling=scaling,
                 original_max_position_embeddings=64)  # fmt: skip
    assert "no family that is tested" in facts["model"]
    never = f"transformers {transformers.__version__} never turns Phi-MoE by the long factors"
    assert any(line.startswith(never) for line in cautions(facts)) == VERSION_5
