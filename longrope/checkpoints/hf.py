"""A folder that plain transformers reads, and what runtimes with its configurations do."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from longrope._warnings import warn
from longrope.checkpoints import source
from longrope.checkpoints.plan import HUGE, Plan
from longrope.factors import RescaleFactors, files, su_attention_factor
from longrope.patching.saving import exporting
from longrope.patching.settings import rope_parameters

ABOUT = "longrope.json"
#: Keys of rope settings that transformers 4 keeps beside them.
_BESIDE = ("rope_theta", "partial_rotary_factor")
#: What transformers 4 calls the keys that transformers 5 writes, by model type.
_OLDER = {
    "gpt_neox": {"rope_theta": "rotary_emb_base", "partial_rotary_factor": "rotary_pct"},
    "qwen3_moe": {"num_local_experts": "num_experts"},
}
#: The scaling of transformers 4's Phi-3 has these keys and no others.
_PHI3_KEYS = ("type", "short_factor", "long_factor")


def write(model: Any, folder: Path, plan: Plan, tokenizer: Any, found: Mapping | None) -> None:
    """Fill `folder` with weights, configuration, tokenizer, and `longrope.json`."""
    origin = source.source_folder(model)
    size = source.shard_size(origin)
    with exporting():
        model.save_pretrained(folder, **({} if size is None else {"max_shard_size": size}))
    config = folder / "config.json"
    before = json.loads(config.read_text(encoding="utf-8"))
    for name in ("auto_map", "_name_or_path"):  # code and paths that the folder does not hold
        before.pop(name, None)
    text = json.dumps(exported_config(before, plan), indent=2)
    config.write_text(text + "\n", encoding="utf-8")
    if tokenizer is None:
        source.carry_tokenizer(origin, folder, plan.long.target_length)
    else:
        tokenizer.save_pretrained(folder)
        source.lengthen_tokenizer(folder, plan.long.target_length)
    files.write_json(folder / ABOUT, files.TIERS, about(plan, before, found))


def exported_config(config: Mapping[str, Any], plan: Plan) -> dict[str, Any]:
    """Return the content of a `config.json` with the rule of `plan` in it.

    `rope_parameters` is for transformers 5, `rope_scaling` and what stands beside it for
    transformers 4 and the runtimes that followed it.
    """
    long, short = plan.long, plan.short
    partial = plan.settings.rotary_dim / plan.settings.head_dim
    rope = {
        "rope_type": "longrope",
        "type": "longrope",  # the older name of the key, which some readers ask for
        "rope_theta": long.rope_theta,
        "short_factor": finite(short),
        "long_factor": finite(long),
        "factor": max(1.0, long.target_length / plan.window),
        "attention_factor": long.attention_factor,
        # vLLM's names; it reads neither of the two before.
        "short_mscale": long.attention_factor,
        "long_mscale": long.attention_factor,
        "original_max_position_embeddings": plan.window,
    }
    if partial != 1:
        rope["partial_rotary_factor"] = partial
    changed = with_rope(config, rope, long.target_length, plan.window)
    if changed.get("head_dim", 0) is None:  # Mixtral's default, which is refused with "longrope"
        changed["head_dim"] = plan.settings.head_dim
    return changed


def finite(factors: RescaleFactors) -> list[float]:
    """Return the lambdas with a huge number in the place of an infinite one."""
    return np.where(np.isinf(factors.lambdas), HUGE, factors.lambdas).tolist()


def with_rope(
    config: Mapping[str, Any], rope: Mapping[str, Any], window: int, original: int | None
) -> dict[str, Any]:
    """Return a configuration with other rope settings, as each transformers names them.

    Parameters
    ----------
    config
        Content of a `config.json`.
    rope
        The settings of the full-attention layers as one dict, `rope_theta` included.
    window
        `max_position_embeddings`.
    original
        `original_max_position_embeddings` beside it, where transformers 4 looks for it.
    """
    changed = dict(config) | {"max_position_embeddings": window}
    changed.pop("original_max_position_embeddings", None)
    if original is not None:
        changed["original_max_position_embeddings"] = original
    kinds = config.get("rope_parameters")
    if kinds and all(isinstance(kind, Mapping) for kind in kinds.values()):
        changed["rope_parameters"] = {**kinds, "full_attention": dict(rope)}
        sliding = kinds.get("sliding_attention", {})
        if config["model_type"] == "gemma3_text" and "rope_theta" in sliding:
            changed["rope_local_base_freq"] = sliding["rope_theta"]
    else:
        changed["rope_parameters"] = dict(rope)
    scaling = {key: value for key, value in rope.items() if key not in _BESIDE}
    if config["model_type"] == "phi3" and _is_usual(rope, window, original):
        scaling = {key: rope[key] for key in _PHI3_KEYS}
    changed["rope_scaling"] = None if rope["rope_type"] == "default" else scaling
    changed |= {key: rope[key] for key in _BESIDE if key in rope}
    for name, older in _OLDER.get(config["model_type"], {}).items():
        if name in changed:
            changed[older] = changed[name]
    return changed


def _is_usual(rope: Mapping[str, Any], window: int, original: int | None) -> bool:
    """Say whether a reader finds the attention factor by itself, from the two lengths."""
    if rope["rope_type"] != "longrope" or original is None:
        return False
    usual = su_attention_factor(window / original, original)
    return math.isclose(usual, rope["attention_factor"], rel_tol=1e-6)


def only_version_5(plan: Plan) -> str | None:
    """Return why transformers 4 cannot read an export, in one sentence; None where it can."""
    if plan.settings.model_type == "olmo2":
        return (
            'transformers 4 knows no rope type "longrope" for OLMo 2 and refuses this folder; '
            "transformers 5 reads it"
        )
    if plan.settings.model_type != "phi3":
        return None
    rope = {"rope_type": "longrope", "attention_factor": plan.long.attention_factor}
    if _is_usual(rope, plan.long.target_length, plan.window):
        return None
    usual = su_attention_factor(plan.long.target_length / plan.window, plan.window)
    return (
        "transformers 4 reads a Phi-3 with the attention factor of its own formula alone, "
        f"{usual:.6g} here, and refuses this folder, whose factor is "
        f"{plan.long.attention_factor:.6g}; transformers 5 reads it"
    )


def about(plan: Plan, config: Mapping[str, Any], found: Mapping | None) -> dict[str, Any]:
    """Return the content of `longrope.json`: tiers, and what `longrope.load` restores."""
    rope = rope_parameters(plan.settings.config)
    rope.pop("type", None)
    if rope["rope_type"] == "default":  # of a class that has one whatever the model
        rope.pop("original_max_position_embeddings", None)
    exported = {
        "short": plan.choice,
        "window": plan.window,
        "dropped_start_tokens": plan.start_tokens,
    }
    return {
        "tiers": [files.with_shared(tier) for tier in plan.tiers],
        "about": {
            "longrope": sys.modules["longrope"].__version__,
            "exported": exported,
            "source": {
                "rope": rope,
                "max_position_embeddings": config["max_position_embeddings"],
                "original_max_position_embeddings": config.get("original_max_position_embeddings"),
            },
            "found": None if found is None else dict(found),
        },
    }


def warn_of_versions(plan: Plan) -> None:
    """Warn where one version of transformers cannot read an export."""
    reason = only_version_5(plan)
    if reason:
        warn(reason)
