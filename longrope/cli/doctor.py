"""What `longrope info` says of a model's folder: what its settings mean, what is wrong, what next.

From config.json and the files beside it alone; no weights are read.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from longrope.cli.folders import check_config
from longrope.factors import RescaleFactors, Tiers
from longrope.factors.heads import span
from longrope.factors.rules import base_inv_freq
from longrope.patching import FAMILIES, RopeSettings, rope_settings
from longrope.patching.settings import LENGTH_DEPENDENT, ORIGINAL, rope_parameters, text_config

#: Angles that are off by more are another position's, for the fastest pairs.
TOLERANCE = 1e-2
#: Where the search for that position ends, in tokens.
_FARTHEST = 1 << 24
_MEANINGS = {
    "default": "none: the frequencies of the training",
    "linear": "position interpolation: all frequencies divided by the factor",
    "dynamic": "NTK by length: the base grows with the sequence beyond the window",
    "yarn": "YaRN: slow pairs interpolated, fast ones kept, attention sharpened",
    "llama3": "Llama 3.1: slow pairs divided by the factor, fast ones kept",
    "longrope": "LongRoPE: a factor for each pair; long ones beyond the original window",
    "proportional": "only a share of the pairs turns",
}


def diagnosis(folder: Path) -> dict[str, str]:
    """Return what a screen says of the model in a folder, in lines by name.

    Also where transformers cannot read its configuration, which is said. Raises `ValueError` where
    it is no model with rotary embeddings, or one that needs code of the folder's own.
    """
    raw = check_config("WHAT", folder)
    if not isinstance(raw.get("model_type"), str):
        raise ValueError(f"WHAT: {folder / 'config.json'}: expected one that names a model_type")
    unread = None
    try:
        config, unread = _read(folder, raw)
        return _facts(folder, config, unread)
    except (ValueError, OSError, ImportError):
        raise
    except (AttributeError, TypeError) as error:  # not even the sizes of a language model
        said = unread or f"expected a model with rotary embeddings ({_in_one_line(error)})"
        raise ValueError(f"WHAT: {said}") from None
    except Exception as error:  # what a value of a wrong type leads to has many kinds
        raise ValueError(f"WHAT: {unread or _in_one_line(error)}") from None


def _facts(folder: Path, config: Any, unread: str | None) -> dict[str, str]:
    """Return the lines; any exception at all where settings are not of the type they should be."""
    settings = rope_settings(config)
    config = text_config(config)
    facts = {
        "model": f"{settings.model_type} ({_family(settings.model_type)})",
        "rope": f"theta {settings.rope_theta:g}, {settings.rotary_dim} of {settings.head_dim} "
        "channels of a head",
        "window": f"{settings.original_length} tokens before scaling, {settings.loaded_length} as "
        "loaded",
        "scaling": f'"{settings.rope_type}", {_MEANINGS.get(settings.rope_type, "unknown")}',
    }
    if settings.rope_type != "default":
        facts["as loaded"] = "not known" if unread else _as_loaded(settings)
    facts |= _tiers(folder)
    sliding = _sliding(config)
    if sliding:
        facts["attention"] = sliding
    position = float32_limit(settings)
    facts["float32 angles"] = (
        f"off by more than {TOLERANCE:g} rad from position {position} on"
        if position
        else f"within {TOLERANCE:g} rad up to position {_FARTHEST}"
    ) + " (transformers' tables; factors that longrope applies turn exactly)"
    faults = [unread] if unread else []
    faults += [*_faults(config, settings), *_of_transformers(settings)]
    for number, fault in enumerate(faults, 1):
        facts[f"caution {number}"] = fault
    facts["next"] = _next(settings, folder)
    return facts


def _read(folder: Path, raw: dict[str, Any]) -> tuple[Any, str | None]:
    """Return a folder's configuration, and what transformers says where it cannot read it."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False), None
    except Exception as error:  # of many kinds: what it validates and how changes by release
        reason = _in_one_line(error)
        said = f"transformers {transformers.__version__} cannot read config.json: {reason}"
        return SimpleNamespace(**(_defaults(raw["model_type"]) | raw)), said


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error.args[0] if error.args else error).split())[:160]


def _defaults(model_type: str) -> dict[str, Any]:
    """Return what a configuration of this type has where its file says nothing."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if model_type not in CONFIG_MAPPING:
        return {}
    fields = CONFIG_MAPPING[model_type]().to_dict()
    rope = fields.pop("rope_parameters", None) or {}
    del fields["model_type"]
    fields.pop("layer_types", None)  # of as many layers as the type has by default
    return {"rope_theta": rope.get("rope_theta")} | fields


def float32_limit(settings: RopeSettings) -> int | None:
    """Return the first position at which float32 angles are off by more than `TOLERANCE` rad.

    As transformers computes them: a float32 position times a float32 frequency. None up to 2^24,
    where float32 no longer holds every position. The error grows with the frequency, and the
    fastest pair turns by whole radians, so the next eight decide.
    """
    exact = base_inv_freq(settings.rope_theta, settings.rotary_dim)[:9]
    rounded = exact.astype(np.float32)
    block = 1 << 16
    for start in range(0, _FARTHEST, block):
        positions = np.arange(start, start + block)[:, None]
        angles = positions.astype(np.float32) * rounded
        wrong = (np.abs(angles - positions * exact) > TOLERANCE).any(1)
        if wrong.any():
            return start + int(np.argmax(wrong))
    return None


def _family(model_type: str) -> str:
    for family in FAMILIES:
        if model_type in family.model_types:
            without = "" if family.tiers else "; tiers by row only"
            return f"a family that is tested: {family.name}{without}"
    return "no family that is tested: longrope.apply tries it on a tiny model first"


def _as_loaded(settings: RopeSettings) -> str:
    try:
        loaded = settings.loaded
    except ValueError as error:
        return str(error).removeprefix("model: ")
    return "frequencies by the length of the sequence" if loaded is None else _in_short(loaded)


def _in_short(factors: RescaleFactors) -> str:
    return f"lambda {span(factors.lambdas)}, attention factor {span(factors.attention_factor)}"


def _tiers(folder: Path) -> dict[str, str]:
    from longrope.checkpoints.hf import ABOUT

    if not (folder / ABOUT).is_file():
        return {}
    tiers = Tiers.load(folder / ABOUT)
    ends = ", ".join(str(end) for end in tiers.limits)
    last = f"up to {ends} tokens; the last: {_in_short(tiers[-1])}"
    return {"tiers": f"{last} (longrope.load applies them by position)"}


def _sliding(config: Any) -> str | None:
    window = getattr(config, "sliding_window", None)
    if window is None or getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    sliding = sum(kind != "full_attention" for kind in kinds)
    if sliding == len(kinds):
        return (
            f"every layer sees {window} tokens at most: no distance beyond that occurs, whatever "
            "the factors; "
            + (
                'layer_types of "full_attention" in config.json lift it'
                if getattr(config, "layer_types", None)
                else "sliding_window null in config.json lifts it"
            )
        )
    if not sliding:
        return None
    return f"{sliding} of {len(kinds)} layers see {window} tokens at most, the others all"


def _faults(config: Any, settings: RopeSettings) -> Iterator[str]:
    """Yield what is missing or contradicts itself in the configuration."""
    parameters = rope_parameters(config)
    expected = settings.rotary_dim // 2
    if settings.rope_type == "longrope":
        for name in ("short_factor", "long_factor"):
            given = parameters.get(name)
            if not isinstance(given, (list, tuple)):
                yield f"{name} is missing: a list of {expected} numbers is expected"
            elif len(given) != expected:
                yield f"{name}: expected {expected} numbers (rotary_dim / 2), got {len(given)}"
    inside = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    named = inside.get(ORIGINAL) if isinstance(inside, Mapping) else None
    beside = getattr(config, ORIGINAL, None)
    whole = getattr(config, "max_position_embeddings", None)
    if settings.rope_type in ("yarn", "longrope", "llama3") and beside is None:
        factor = float(parameters.get("factor") or 1)
        if named in (None, whole) and (factor > 1 or settings.rope_type == "longrope"):
            yield (
                f"no {ORIGINAL} below max_position_embeddings ({whole}): the scaling counts from "
                f"{settings.original_length}; name the window of the training if that was another"
            )
    if settings.rope_type == "linear" and named is None and beside is None:
        yield (
            f"no {ORIGINAL}: the window before the scaling is taken to be "
            f"{settings.original_length}, what is left of {settings.loaded_length} by the factor"
        )


def _of_transformers(settings: RopeSettings) -> Iterator[str]:
    """Yield known faults of the installed transformers with this model, by a look at its source."""
    import transformers

    version = f"transformers {transformers.__version__}"
    if settings.model_type == "phimoe" and settings.rope_type == "longrope":
        file = importlib.import_module("transformers.models.phimoe.modeling_phimoe")
        if "rope_init_fn(self.config)" in inspect.getsource(file.PhimoeRotaryEmbedding.forward):
            yield f"{version} never turns Phi-MoE by the long factors, whatever the length"
    elif settings.rope_type in LENGTH_DEPENDENT:
        drops = settings.model_type in ("phi3", "phi4_multimodal")
        yield (
            f"{version} chooses the frequencies for the whole batch by its longest row, and keys "
            "cached before a crossing stay as they were"
            + (", but for generate, which reads the prompt again" if drops else "")
        )


def _next(settings: RopeSettings, folder: Path) -> str:
    from longrope.checkpoints.hf import ABOUT

    if (folder / ABOUT).is_file():
        return f"longrope.load({str(folder)!r}) applies its tiers"
    target = 8 * settings.loaded_length
    return f"longrope search {folder} DATA --target-length {target} --out RUN"
