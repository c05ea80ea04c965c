"""Tiny language models with random weights, made from configurations alone."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

from longrope import RescaleFactors

CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}
ORIGINAL, TARGET, ROTARY_DIM = 32, 128, 16


def rope_arguments(rope_theta=10000.0, partial_rotary_factor=None, **scaling):
    """Return the arguments of a configuration that name its rope settings, in 4.57 and 5.x."""
    partial = {} if partial_rotary_factor is None else {
        "partial_rotary_factor": partial_rotary_factor
    }  # fmt: skip
    if int(transformers.__version__.split(".")[0]) >= 5:
        settings = {"rope_type": "default", "rope_theta": rope_theta} | partial | scaling
        return {"rope_parameters": settings}
    return {"rope_theta": rope_theta, "rope_scaling": scaling or None} | partial


def build(kind="llama", rope=None, dtype=torch.float32, **extra):
    """Return a model of 4 heads of 16 channels and a window of 32 tokens, in eval mode.

    The same weights at every call with the same shape. They are large enough that positions
    matter: with the usual initialisation attention is all but uniform.
    """
    settings = {
        "vocab_size": 64,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,  # 4.57 cannot scale a Mistral that leaves it out
        "max_position_embeddings": ORIGINAL,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
    }
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = CONFIGS[kind](**(settings | rope_arguments(**(rope or {})) | extra))
        return AutoModelForCausalLM.from_config(config).to(dtype).eval()


def factors(kind="yarn", target=TARGET, **changes):
    """Return baseline factors for the models of `build`, with some fields changed."""
    made = getattr(RescaleFactors, kind)(
        original_length=ORIGINAL, target_length=target, rotary_dim=ROTARY_DIM
    )
    return made.replace(**changes)


def tokens(batch=2, length=TARGET):
    """Return random token ids without the padding token."""
    return torch.randint(1, 64, (batch, length))
