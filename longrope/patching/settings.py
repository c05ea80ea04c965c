"""What a model's configuration says about its rotary embedding."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from longrope.factors import RescaleFactors
from longrope.patching.wrappers import language_model

#: Rope types of transformers whose angles depend on the length of the whole sequence.
LENGTH_DEPENDENT = ("dynamic", "longrope")
#: Rope types whose factor stretches the window to what the configuration calls it.
_STRETCHED = ("linear", "llama3", "proportional")
#: The field of a configuration that names the window before its scaling.
ORIGINAL = "original_max_position_embeddings"
#: Older names of rope types.
_SAME_AS = {"su": "longrope", "ntk": "dynamic"}
#: A lambda that is off a whole number by no more is that number: transformers has float32.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class RopeSettings:
    """The rotary embedding of a model, as its configuration states it.

    Attributes
    ----------
    model_type
        The configuration's name of the architecture.
    rope_theta
        Base of the frequencies.
    rotary_dim, head_dim
        Rotated channels of a head, and all of them; `rotary_dim <= head_dim`.
    original_length
        The window before any scaling that the configuration names, in tokens.
    loaded_length
        The window of the model as loaded, in tokens; `original_length` without a scaling.
    rope_type
        The scaling that the configuration names: "default", "linear", "dynamic", "yarn",
        "longrope", "llama3", "proportional".
    config
        The configuration itself.
    """

    model_type: str
    rope_theta: float
    rotary_dim: int
    head_dim: int
    original_length: int
    loaded_length: int | None = None
    rope_type: str = "default"
    config: Any = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        """Without a scaling the window of the model as loaded is the original one."""
        if self.loaded_length is None:
            object.__setattr__(self, "loaded_length", self.original_length)

    @functools.cached_property
    def loaded(self) -> RescaleFactors | None:
        """What the configuration does, as factors whose `target_length` is `loaded_length`.

        Those of `RescaleFactors.none` without a scaling; of type "longrope" the long factors. None
        for type "dynamic", whose frequencies depend on the length.
        """
        plain = RescaleFactors.none(**self.lengths(self.loaded_length))
        return plain if self.config is None else _loaded(self.config, self.rope_type, plain)

    def lengths(self, target_length: int) -> dict[str, Any]:
        """Return the keyword arguments of `RescaleFactors.none`, `.pi`, `.yarn` and so on.

        `RescaleFactors.yarn(**rope_settings(model).lengths(32768))`.
        """
        return {
            "original_length": self.original_length,
            "target_length": target_length,
            "rope_theta": self.rope_theta,
            "rotary_dim": self.rotary_dim,
        }


def rope_settings(model_or_config: Any) -> RopeSettings:
    """Read the settings of the rotary embedding from a Hugging Face model or configuration.

    Raises
    ------
    TypeError
        When the argument is no model and no configuration.
    ValueError
        When the model has no rotary position embedding, or its configuration no window.
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
    rope_type = parameters["rope_type"]
    # Gemma 4's "proportional" keeps all channels in the table and stops those beyond the part.
    stays = partial is None or rope_type == "proportional"
    rotary_dim = head_dim if stays else int(head_dim * partial)
    original, loaded_length = _windows(config, parameters)
    return RopeSettings(
        config.model_type, float(parameters["rope_theta"]), rotary_dim, head_dim, original,
        loaded_length, rope_type, config,
    )  # fmt: skip


def rope_parameters(config: Any) -> dict:
    """Return the rope settings of a configuration as one flat dict, `rope_theta` included.

    transformers 5 keeps them in `rope_parameters`, by layer type for some families (the
    full-attention layers are meant then); transformers 4 in `rope_scaling`, with `rope_theta` and
    the partial rotary factor beside it.
    """
    found = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    by_layer = _by_layer_type(found)
    merged = dict(by_layer[_extended(by_layer)] if by_layer else found)
    # The one beside the dict is what transformers computes by, whatever it has put into the dict.
    original = getattr(config, ORIGINAL, None)
    if original is not None and not by_layer:
        merged[ORIGINAL] = original
    beside = {
        "rope_theta": ("rope_theta", "rotary_emb_base"),
        "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
        ORIGINAL: (ORIGINAL,),
    }
    for key, names in beside.items():
        values = [getattr(config, name, None) for name in names]
        values = [value for value in values if value is not None]
        if merged.get(key) is None and values:
            merged[key] = values[0]
    named = merged.get("rope_type") or merged.get("type") or "default"
    merged["rope_type"] = _SAME_AS.get(named, named)
    return merged


def _by_layer_type(found: Mapping) -> dict[str, Mapping]:
    """Return the settings of each layer type, of those that have any; empty: there is one for all.

    A layer type may have none (without a rotary embedding).
    """
    return {kind: value for kind, value in found.items() if isinstance(value, Mapping)}


def _extended(by_layer: Mapping) -> str:
    """Return the layer type that factors are for."""
    return "full_attention" if "full_attention" in by_layer else next(iter(by_layer))


def text_config(model_or_config: Any) -> Any:
    """Return the configuration of the language model in `model_or_config`."""
    inner = language_model(model_or_config)
    config = getattr(inner, "config", inner)
    if not hasattr(config, "model_type"):
        raise TypeError(
            "model: expected a Hugging Face model or its configuration, "
            f"got {type(model_or_config).__name__}"
        )
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _windows(config: Any, parameters: dict) -> tuple[int, int]:
    """Return the window before the named scaling, and that of the model as loaded."""
    loaded = getattr(config, "max_position_embeddings", None)
    if loaded is None:
        raise ValueError(
            "model: expected a configuration with max_position_embeddings, "
            f'got model_type "{config.model_type}" without one'
        )
    loaded, rope_type = int(loaded), parameters["rope_type"]
    original = parameters.get(ORIGINAL)
    if rope_type == "default":
        original = None  # of a class that has one whatever the model (Phi-4)
    factor = max(1.0, float(parameters.get("factor") or 1))
    if original is None:
        # LongChat and Vicuna: the window after their linear scaling stands in a field of its own.
        further = getattr(config, "max_sequence_length", None) or 0
        if rope_type == "linear" and further > loaded:
            return loaded, int(further)
        if rope_type in _STRETCHED:
            return max(1, round(loaded / factor)), loaded
        # "yarn" and "longrope" count from the window of the configuration where none is named.
        original = loaded
    original = int(original)
    if loaded <= original and rope_type in ("yarn", "longrope", *_STRETCHED):
        loaded = round(original * factor)  # some keep the original window in both places
    return original, loaded


def _loaded(config: Any, rope_type: str, plain: RescaleFactors) -> RescaleFactors | None:
    """Return the factors that a configuration names, as transformers computes them."""
    if rope_type == "default":
        return plain
    if rope_type == "dynamic":
        return None
    inv_freq, attention_factor = _named_frequencies(config, rope_type)
    with np.errstate(divide="ignore"):
        lambdas = plain.base_inv_freq() / inv_freq
    finite = np.isfinite(lambdas)
    whole = np.round(lambdas[finite])
    close = np.abs(lambdas[finite] - whole) <= _ROUNDING * whole
    lambdas[finite] = np.where(close, whole, lambdas[finite])
    return plain.replace(lambdas=lambdas, attention_factor=attention_factor)


def _named_frequencies(config: Any, rope_type: str) -> tuple[np.ndarray, float]:
    """Return the frequencies `[R/2]` and the attention factor by transformers' own function."""
    import transformers
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    function = ROPE_INIT_FUNCTIONS.get(rope_type)
    if function is None:
        raise ValueError(f'model: expected a rope type that transformers knows, got "{rope_type}"')
    arguments: dict[str, Any] = {"device": "cpu"}
    if rope_type == "longrope":
        arguments["seq_len"] = 1 << 40  # the long factors
    by_layer = _by_layer_type(getattr(config, "rope_parameters", None) or {})
    if by_layer and "layer_type" in inspect.signature(function).parameters:
        arguments["layer_type"] = _extended(by_layer)
    try:
        inv_freq, attention_factor = function(config, **arguments)
    except (KeyError, TypeError, RuntimeError) as error:
        raise ValueError(
            f'model: expected a rope scaling "{rope_type}" that transformers '
            f"{transformers.__version__} can compute, got one on which it raises "
            f"{type(error).__name__}: {error}"
        ) from None
    return inv_freq.double().numpy(), float(attention_factor)
