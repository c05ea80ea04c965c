"""The model families that longrope knows: a row for each, and the way into a model of any of them.

What a family may do differently stands here and nowhere else: where its decoder keeps layers and
their attention, which of its classes have gated layers of the usual form. What the families share
is the shape of transformers' files: one rotary module in the decoder, an `apply_rotary_pos_emb` in
the file that pairs channel `i` with `i + R/2`, and attention that is looked up in
`AttentionInterface`.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from typing import Any

from torch import nn

from longrope.patching.settings import rope_settings, text_config
from longrope.patching.wrappers import language_model, unwrapped


@dataclass(frozen=True)
class Family:
    """What sets a family of models apart.

    Attributes
    ----------
    name
        As people say it.
    model_types
        `model_type` of its configurations.
    attention
        The attribute of a decoder layer that holds its attention.
    gated_mlp
        The class whose forward is `down_proj(act_fn(gate_proj(x)) * up_proj(x))`; None: another.
    since
        The first major release of transformers whose file has the usual shape.
    kernels
        Whether `ops.attention` computes what its layers do. Attention sinks are no part of it.
    tiers
        Whether tiers by position work.
    tested
        Whether it is a row below, which the tests hold; else a trial has found it out.
    """

    name: str
    model_types: tuple[str, ...]
    attention: str = "self_attn"
    gated_mlp: str | None = None
    since: int = 4
    kernels: bool = True
    tiers: bool = True
    tested: bool = True


FAMILIES = (
    Family("Llama", ("llama",), gated_mlp="LlamaMLP"),
    Family("Mistral", ("mistral",), gated_mlp="MistralMLP"),
    Family("Qwen2", ("qwen2",), gated_mlp="Qwen2MLP"),
    Family("Qwen3", ("qwen3",), gated_mlp="Qwen3MLP"),
    Family("Phi-3, Phi-4", ("phi3",)),
    Family("Gemma", ("gemma",), gated_mlp="GemmaMLP"),
    Family("Gemma 2", ("gemma2",), gated_mlp="Gemma2MLP"),
    Family("Gemma 3 (text)", ("gemma3_text",), gated_mlp="Gemma3MLP", since=5),
    Family("OLMo 2", ("olmo2",), gated_mlp="Olmo2MLP"),
    Family("OLMo 3", ("olmo3",), gated_mlp="Olmo3MLP", since=5),
    Family("Granite", ("granite",), gated_mlp="GraniteMLP"),
    Family("SmolLM3", ("smollm3",), gated_mlp="SmolLM3MLP"),
    Family("GPT-NeoX, Pythia", ("gpt_neox",), attention="attention"),
    Family("Mixtral", ("mixtral",)),
    Family("Qwen2 MoE", ("qwen2_moe",), since=5),
    Family("Qwen3 MoE", ("qwen3_moe",)),
    Family("Ministral", ("ministral",), gated_mlp="MinistralMLP"),
    Family("gpt-oss", ("gpt_oss",), kernels=False, tiers=False),
)

_BY_TYPE = {model_type: family for family in FAMILIES for model_type in family.model_types}

#: What trials have found of other models, by the file that defines them.
_TRIED: dict[str, Family | str] = {}

#: `model_type` of the configurations whose models the tests hold; `longrope.apply` tries others.
SUPPORTED_MODEL_TYPES = tuple(_BY_TYPE)


def family_of(model_or_config: Any) -> Family:
    """Return the family of a model, or what a trial finds of one that is of no known family.

    `ValueError` in one sentence where that fails, and for a configuration of no known family.
    """
    config = text_config(model_or_config)
    family = _BY_TYPE.get(config.model_type)
    if family is None:
        rope_settings(config)  # no rotary embedding at all is the better message
        found = _tried(model_or_config) if isinstance(model_or_config, nn.Module) else ""
        if isinstance(found, Family):
            return found
        raise ValueError(
            f"model: expected one of the model types {', '.join(SUPPORTED_MODEL_TYPES)}, or one "
            f'that works like them, got "{config.model_type}"' + (f": {found}" if found else "")
        )
    import transformers

    if int(transformers.__version__.split(".")[0]) < family.since:
        raise ValueError(
            f"model: expected transformers {family.since} or newer for {family.name}, got "
            f"{transformers.__version__}"
        )
    return family


def _tried(model: nn.Module) -> Family | str:
    """Return the family of a model that is in no row, by trial, or what speaks against it."""
    from longrope.patching.trial import TrialError, attention_name, try_model

    file = type(model).__module__
    if file not in _TRIED:
        name = text_config(model).model_type
        try:
            attention = attention_name(getattr(model, "base_model", model))
            _TRIED[file] = Family(name, (name,), attention, tested=False)  # while it is tried
            kernels, tiers = try_model(model)
            _TRIED[file] = dataclasses.replace(_TRIED[file], kernels=kernels, tiers=tiers)
        except TrialError as error:
            _TRIED[file] = str(error)
        except BaseException:  # interrupted, say: nothing is known
            _TRIED.pop(file, None)
            raise
    return _TRIED[file]


def decoder(model: nn.Module) -> nn.Module:
    """Return the module that holds the decoder layers and `rotary_emb`, or say why there is none.

    Looks through all wrappers (`longrope.patching.wrappers`) and the language model head.
    """
    inner = language_model(model)
    family_of(inner)
    base = unwrapped(getattr(inner, "base_model", inner))
    if not hasattr(base, "rotary_emb"):
        raise ValueError(
            f"model: expected a decoder with rotary_emb, got {type(base).__name__} without one"
        )
    return base


def attention_layers(base: nn.Module) -> list[nn.Module]:
    """Return the attention of every layer of a decoder, in order."""
    name = family_of(base).attention
    return [getattr(layer, name) for layer in base.layers]


def file_of(attention: nn.Module) -> Any:
    """Return the module of transformers that defines an attention layer."""
    return sys.modules[type(attention).__module__]


def window_of(attention: nn.Module) -> int | None:
    """Return the sliding window of an attention layer, in tokens; None: it sees all before it."""
    config, index = attention.config, attention.layer_idx
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and kinds[index] == "full_attention":
        return None  # also where each layer has the window's size as an attribute
    if hasattr(attention, "sliding_window"):
        return attention.sliding_window
    return getattr(config, "sliding_window", None)


def layer_type_of(attention: nn.Module) -> str:
    """Return what a configuration calls the kind of an attention layer."""
    kinds = getattr(attention.config, "layer_types", None)
    return "full_attention" if kinds is None else kinds[attention.layer_idx]
