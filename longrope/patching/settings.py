"""What a model's configuration says about its rotary embedding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple


class RopeSettings(NamedTuple):
    """The rotary embedding of a model, as its configuration states it.

    `original_length` is the context window that the model was trained for, in tokens, before any
    rope scaling that the configuration names; `rotary_dim <= head_dim`.
    """

    model_type: str
    rope_theta: float
    rotary_dim: int
    head_dim: int
    original_length: int


def rope_parameters(config: Any) -> dict:
    """Return the rope settings of a configuration as one flat dict, `rope_theta` included.

    transformers 5 keeps them in `rope_parameters`, by layer type for some families (the
    full-attention layers are meant then); transformers 4 in `rope_scaling`, with `rope_theta` and
    the partial rotary factor beside it.
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if found and all(isinstance(value, Mapping) for value in found.values()):
        found = found.get("full_attention") or next(iter(found.values()))
    merged = dict(found)
    beside = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        "original_max_position_embeddings": ("original_max_position_embeddings",),
    }
    for key, names in beside.items():
        values = [getattr(config, name, None) for name in names]
        values = [value for value in values if value is not None]
        if key not in merged and values:
            merged[key] = values[0]
    merged.setdefault("rope_type", merged.get("type", "default"))
    return merged


def text_config(model_or_config: Any) -> Any:
    """Return the configuration of the language model in `model_or_config`."""
    config = getattr(model_or_config, "config", model_or_config)
    if not hasattr(config, "model_type"):
        raise TypeError(
            "model: expected a Hugging Face model or its configuration, "
            f"got {type(model_or_config).__name__}"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def rope_settings(model_or_config: Any) -> RopeSettings:
    """Read the settings of the rotary embedding from a Hugging Face model or configuration.

    Returns
    -------
    RopeSettings
        `(model_type, rope_theta, rotary_dim, head_dim, original_length)`. `head_dim` is the
        explicit one where the configuration has it (it need not be hidden_size / heads).
        `original_length` is `original_max_position_embeddings` where the model names one, else
        `max_position_embeddings`; never the sliding window.

    Raises
    ------
    TypeError
        When the argument is no model and no configuration.
    ValueError
        When the model has no rotary position embedding.
    """
    config = text_config(model_or_config)
    parameters = rope_parameters(config)
    # A rotary model has a base: GPT-2, BERT, T5 and the like have none.
    if parameters.get("rope_theta") is None:
        raise ValueError(
            "model: expected a model with rotary position embeddings, "
            f'got model_type "{config.model_type}", which has none'
        )
    head_dim = getattr(config, "head_dim", None)
    if head_dim is None:
        head_dim = config.hidden_size // config.num_attention_heads
    partial = parameters.get("partial_rotary_factor")
    rotary_dim = int(head_dim * (1.0 if partial is None else partial))
    original = parameters.get("original_max_position_embeddings")
    if original is None:
        original = config.max_position_embeddings
    return RopeSettings(
        config.model_type, float(parameters["rope_theta"]), rotary_dim, head_dim, int(original)
    )
