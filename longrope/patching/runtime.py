"""What a model takes on its way through longrope: attention, caches and devices, before it runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from longrope.patching.attention import LARGEST_HEAD_DIM, uses_interface
from longrope.patching.families import attention_layers, decoder, family_of
from longrope.patching.rotation import DEVICES_WITH_KERNELS
from longrope.patching.settings import LENGTH_DEPENDENT, rope_settings
from longrope.patching.tier_cache import stays_as_loaded


def runtime_facts(model: nn.Module) -> dict[str, Any]:
    """Say in words which paths a model takes under tiers by position.

    A model on the meta device, made from a configuration, is enough.
    """
    base, settings = decoder(model), rope_settings(model)
    layers = attention_layers(base)
    window = settings.loaded_length
    without_rope = [layer for layer in layers if not getattr(layer, "use_rope", True)]
    staying = [layer for layer in layers if stays_as_loaded(layer, window)]
    fits = settings.head_dim <= LARGEST_HEAD_DIM and all(map(uses_interface, layers))
    kernels = ", ".join(DEVICES_WITH_KERNELS)
    ours = f"ops.attention on {kernels}; torch's SDPA elsewhere"
    first = "the model's own rotary module, its angles and casts"
    if settings.rope_type in LENGTH_DEPENDENT:
        first = f'ops.rope ("{settings.rope_type}" turns by the length of the sequence)'
    return {
        "family": family_of(model).name,
        "rope": f"{settings.rope_type}, theta {settings.rope_theta:g}, "
        f"{settings.rotary_dim} of {settings.head_dim} channels",
        "window": f"{settings.original_length} tokens"
        + (f", {window} as loaded" if window != settings.original_length else ""),
        "layers extended": f"{len(layers) - len(staying) - len(without_rope)} of {len(layers)}"
        + (f"; {len(staying)} keep a sliding window within the first tier" if staying else "")
        + (f"; {len(without_rope)} have no RoPE" if without_rope else ""),
        "first tier": first,
        "other tiers": ours if fits else "not possible: tiers by row only",
        "caches": "DynamicCache, StaticCache (also compiled); keys turned in place at a crossing, "
        'or kept un-rotated (cached_keys="unrotated")',
        "devices with kernels": kernels + ("" if torch.version.cuda else " (torch without CUDA)"),
    }
