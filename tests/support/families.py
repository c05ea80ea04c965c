"""A tiny random model of every family of the registry."""

from __future__ import annotations

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from support.tiny_models import ORIGINAL, ROTARY_DIM, TARGET, rope_arguments

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
    # Attention sinks: transformers' own SDPA refuses them.
    "gpt_oss": MOE | {
        "num_local_experts": 4, "sliding_window": 16, "attn_implementation": "eager",
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "granite": {"attention_multiplier": 0.25},
    "ministral": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "mistral": {"sliding_window": None},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "olmo3": {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"]},
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 32},
    "qwen3_moe": MOE,
    "smollm3": {"no_rope_layers": [1, 0]},
}  # fmt: skip
#: Rotary dimensions, where they are not all of the head's.
PARTIAL = {"gpt_neox": 0.25, "phi3": 0.5}


def build(model_type, head_dim=SMALL["head_dim"], **scaling):
    """Return a tiny model of a family, theta 10000; `head_dim` None: of the family's own size."""
    partial = PARTIAL.get(model_type)
    rope = rope_arguments(partial_rotary_factor=partial, **scaling)
    if model_type == "gpt_neox" and not VERSION_5:
        rope |= {"rotary_pct": partial, "rotary_emb_base": 10000}
    if model_type == "gpt_oss" and not VERSION_5 and not scaling:
        rope["rope_scaling"] = {"rope_type": "default"}  # else that of the released models
    if model_type in ("gemma3_text", "olmo3") and VERSION_5:
        kinds = ("full_attention", "sliding_attention")
        plain = {"rope_type": "default", "rope_theta": 10000.0}
        rope = {"rope_parameters": {kinds[0]: rope["rope_parameters"], kinds[1]: plain}}
    settings = SMALL | {"head_dim": head_dim} | rope | EXTRA.get(model_type, {})
    settings = {k: v for k, v in settings.items() if v is not None or k.endswith("token_id")
                or k == "sliding_window"}  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = AutoConfig.for_model(model_type, **settings)
        return AutoModelForCausalLM.from_config(config).eval()


def sizes(model_type, target=TARGET):
    rotary_dim = int(ROTARY_DIM * PARTIAL.get(model_type, 1))
    return {"original_length": ORIGINAL, "target_length": target, "rotary_dim": rotary_dim}
