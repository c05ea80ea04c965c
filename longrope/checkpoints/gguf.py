"""One file of llama.cpp's llama architecture, with both sets of factors in it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longrope._validation import choice
from longrope.checkpoints import source
from longrope.checkpoints.hf import finite
from longrope.checkpoints.plan import Plan

NAME = "model.gguf"
#: Types of weights, by the names of llama.cpp, with their number there (`LlamaFileType`).
TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}
_OF_DTYPE = {torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
#: Model types whose weights are those of the llama architecture.
MODEL_TYPES = ("llama", "mistral")
_Q8_BLOCK = 32
_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def check(model: Any, gguf_type: str | None, target_length: int) -> str:
    """Return the type of weights, or say in one sentence why a model cannot be written."""
    try:
        import gguf  # noqa: F401
    except ImportError:
        raise ImportError('format: "gguf" needs the package gguf (pip install gguf)') from None
    config = model.config
    if config.model_type not in MODEL_TYPES:
        raise ValueError(
            f"format: expected one of the model types {', '.join(MODEL_TYPES)} for gguf, whose "
            f'llama architecture alone takes factors, got "{config.model_type}"'
        )
    if not hasattr(model, "lm_head"):
        raise ValueError(f"model: expected a language model head, got {type(model).__name__}")
    window = getattr(config, "sliding_window", None)
    if window is not None and window < target_length:
        raise ValueError(
            f"model: expected no sliding window, which llama.cpp's llama architecture has not, "
            f"got one of {window} tokens"
        )
    if config.hidden_act != "silu":
        raise ValueError(f'model: expected the activation "silu", got "{config.hidden_act}"')
    if gguf_type is None:
        gguf_type = _OF_DTYPE.get(model.dtype, "f16")
    choice("gguf_type", gguf_type, TYPES)
    columns = {p.shape[-1] for p in model.parameters() if p.ndim == 2}
    if gguf_type == "q8_0" and any(count % _Q8_BLOCK for count in columns):
        raise ValueError(
            f"gguf_type: expected rows of a multiple of {_Q8_BLOCK} weights for q8_0, got "
            f"{min(count for count in columns if count % _Q8_BLOCK)}"
        )
    return gguf_type


def write(model: Any, file: Path, plan: Plan, gguf_type: str) -> list[str]:
    """Write the file; returns what its card should say beside the usual."""
    import gguf

    writer = gguf.GGUFWriter(file, "llama")
    _describe(writer, model, plan, gguf_type)
    missing = _vocabulary(writer, source.source_folder(model), model.config)
    kind = gguf.GGMLQuantizationType[gguf_type.upper()]
    for name, tensor in _tensors(model):
        stored = kind if tensor.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(tensor, stored), raw_dtype=stored)
    for name, factors in (("long", plan.long), ("short", plan.short)):
        values = np.asarray(finite(factors), np.float32)
        writer.add_tensor(f"rope_factors_{name}.weight", values)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()
    return [f"weights are {gguf_type}", *([missing] if missing else [])]


def _describe(writer: Any, model: Any, plan: Plan, gguf_type: str) -> None:
    import gguf

    config, settings = model.config, plan.settings
    writer.add_name(source.source_name(model) or "longrope")
    writer.add_file_type(TYPES[gguf_type])
    writer.add_context_length(plan.long.target_length)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(settings.head_dim)
    writer.add_value_length(settings.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_rope_dimension_count(settings.rotary_dim)
    writer.add_rope_freq_base(settings.rope_theta)
    # No rope.scaling.factor: llama.cpp would divide all frequencies by it once more.
    writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
    writer.add_rope_scaling_orig_ctx_len(plan.window)
    writer.add_rope_scaling_attn_factors(plan.long.attention_factor)


def _tensors(model: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the weights under llama.cpp's names, float32."""
    config = model.config
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        stem, _, kind = name.rpartition(".")
        block = ""
        if stem.startswith("model.layers."):
            index, stem = stem.removeprefix("model.layers.").split(".", 1)
            block = f"blk.{index}."
        if stem == "lm_head" and tied:
            continue
        there = _TENSORS[stem]
        values = tensor.detach().float().cpu().numpy()
        if there in heads:
            values = _pairs_side_by_side(values, heads[there])
        yield f"{block}{there}.{kind}", np.ascontiguousarray(values)


def _pairs_side_by_side(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorder the rows of each head: channels `i` and `i + R/2`, which turn together, adjoin."""
    halves = values.reshape(heads, 2, -1, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _vocabulary(writer: Any, origin: Path | None, config: Any) -> str | None:
    """Write the vocabulary, where it is one that llama.cpp cuts texts by; else say that not."""
    import gguf

    file = origin / "tokenizer.json" if origin else None
    tokenizer, pre = {}, None
    if file is not None and file.is_file():
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        pre = _pre_tokenizer(tokenizer)
    if pre is not None:
        added = {entry["content"]: entry for entry in tokenizer.get("added_tokens", [])}
        ids = {**tokenizer["model"]["vocab"], **{name: e["id"] for name, e in added.items()}}
    if pre is None or max(ids.values()) >= config.vocab_size:
        writer.add_tokenizer_model("no_vocab")
        return (
            "the file has no vocabulary (only byte-level BPE as in GPT-2, Llama 3 and SmolLM is "
            "written): give llama.cpp token ids, or add one with its own tools"
        )
    tokens = [f"[PAD{number}]" for number in range(config.vocab_size)]
    types = [gguf.TokenType.UNUSED] * config.vocab_size
    for name, number in ids.items():
        tokens[number], types[number] = name, gguf.TokenType.NORMAL
    for entry in added.values():
        control = gguf.TokenType.CONTROL if entry.get("special") else gguf.TokenType.USER_DEFINED
        types[entry["id"]] = control
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = gguf.SpecialVocab(origin, load_merges=True, n_vocab=config.vocab_size)
    special.add_to_gguf(writer, quiet=True)  # merges, the ids of BOS and the like, chat template
    return None


#: How Llama 3 cuts a text into words before BPE.
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _pre_tokenizer(tokenizer: dict) -> str | None:
    """Return llama.cpp's name of how a tokenizer cuts texts before BPE; None: another way."""
    if tokenizer["model"].get("type") != "BPE" or tokenizer.get("normalizer"):
        return None
    outer = tokenizer.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    kinds = [step.get("type") for step in steps]
    if kinds == ["ByteLevel"] and steps[0].get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm" if steps[1].get("use_regex", True) else None
    if kinds == ["Split", "ByteLevel"] and steps[0].get("pattern") == {"Regex": _LLAMA_3}:
        return "llama-bpe"
    return None
