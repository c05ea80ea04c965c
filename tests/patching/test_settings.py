"""What configurations say of the window before their scaling, in every form that they have."""

from __future__ import annotations

import json

import pytest
import torch
from support.families import VERSION_5
from transformers import AutoConfig, AutoModelForCausalLM

from longrope.patching import rope_settings

pytestmark = pytest.mark.usefixtures("one_thread")

BEFORE = "original_max_position_embeddings"
TWOS = {"short_factor": [2.0] * 8, "long_factor": [2.0] * 8}
LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
YARN = {"rope_type": "yarn", "factor": 4.0}


def scaled(*, window=256, top=None, **scaling):
    """Return the fields of a configuration with a scaling; `top` stands beside it."""
    return {"max_position_embeddings": window, "rope_scaling": scaling, **({BEFORE: top} if top
            else {})}  # fmt: skip


#: In all of them the window is 64 tokens before the scaling, and 256 as loaded.
SAME = {
    "linear": scaled(type="linear", factor=4.0),
    "linear, named": scaled(rope_type="linear", factor=4.0, **{BEFORE: 64}),
    "linear, beside": scaled(rope_type="linear", factor=4.0, top=64),
    "linear, Vicuna": scaled(window=64, type="linear", factor=4.0) | {"max_sequence_length": 256},
    "llama3": scaled(**LLAMA3, **{BEFORE: 64}),
    "yarn": scaled(**YARN, **{BEFORE: 64}),
    "yarn, Qwen": scaled(window=64, **YARN, **{BEFORE: 64}),
    "yarn, beside": scaled(**YARN, top=64),
    "yarn, none named": scaled(window=64, **YARN),
    "dynamic": scaled(rope_type="dynamic", factor=4.0, **{BEFORE: 64}),
    "longrope, beside": scaled(rope_type="longrope", **TWOS, top=64),
    "longrope, none named": scaled(window=64, rope_type="longrope", factor=4.0, **TWOS),
    "longrope, two named": scaled(rope_type="longrope", **TWOS, top=64, **{BEFORE: 128}),
}
VERSION_5_ONLY = {
    "llama3, beside": scaled(**LLAMA3, top=64),
    "longrope": scaled(rope_type="longrope", **TWOS, **{BEFORE: 64}),
    "proportional": scaled(rope_type="proportional", factor=4.0, partial_rotary_factor=0.5),
    "by layer type": {
        "model_type": "gemma3_text", "architectures": ["Gemma3ForCausalLM"],
        "max_position_embeddings": 256,
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {**YARN, "rope_theta": 1e4, BEFORE: 64},
        },
    },
}  # fmt: skip


def config_of(folder, **fields):
    """Return a configuration as a user has it: config.json on disk, read by AutoConfig."""
    base = {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64,
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rope_theta": 10000.0,
    }  # fmt: skip
    if "rope_parameters" in fields:
        del base["rope_theta"]
    (folder / "config.json").write_text(json.dumps(base | fields))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("name", [*SAME, *(VERSION_5_ONLY if VERSION_5 else ())])
def test_the_window_before_the_scaling(tmp_path, name):
    settings = rope_settings(config_of(tmp_path, **(SAME | VERSION_5_ONLY)[name]))
    before = (settings.original_length, settings.loaded_length)
    assert before == (64, 256)
    assert settings.loaded is None or settings.loaded.target_length == 256


@pytest.mark.parametrize("name", [name for name in SAME if name not in ("dynamic",)])
def test_loaded_is_what_the_model_turns_by(tmp_path, name):
    """Also where transformers and the configuration disagree: the factors are the model's."""
    config = config_of(tmp_path, **SAME[name])
    rotary = AutoModelForCausalLM.from_config(config).model.rotary_emb
    loaded = rope_settings(config).loaded
    rotary(torch.zeros(1, 1, 4), torch.arange(257)[None])  # "longrope" turns to its long factors
    actual = torch.from_numpy(loaded.inv_freq()).float()
    torch.testing.assert_close(actual, rotary.inv_freq, rtol=1e-5, atol=0)
    assert loaded.attention_factor == pytest.approx(rotary.attention_scaling)


def test_a_scaling_that_transformers_cannot_compute_is_one_sentence(tmp_path):
    config = config_of(tmp_path, **scaled(rope_type="linear", factor=4.0))
    for settings in (getattr(config, "rope_parameters", None), config.rope_scaling):
        if settings:
            settings.pop("factor", None)
    with pytest.raises(ValueError, match=r'^model: expected a rope scaling "linear" that transf'):
        _ = rope_settings(config).loaded
