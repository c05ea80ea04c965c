"""What a model has when a search begins: factors or tiers applied, or a scaling in its config."""

from __future__ import annotations

import numpy as np
from torch import nn

from longrope.factors import RescaleFactors, Tiers
from longrope.patching import RopeSettings
from longrope.patching.families import decoder


def tiers_as_found(
    model: nn.Module,
    rope: RopeSettings,
    original_length: int,
    scaling: str,
    applied: Tiers | None = None,
) -> Tiers:
    """Return the tiers under which a model computes when a search begins, one or more.

    Those that are applied, or will be by then (`applied`); else what the config names; else one
    that changes nothing, in a window of `original_length` tokens. So too where `scaling` is
    `"ignore"`, and where the frequencies of the config's scaling depend on the length (type
    "dynamic"), which nothing can multiply.
    """
    plain = RescaleFactors.none(
        **{**rope.lengths(original_length), "original_length": original_length}
    )
    if scaling == "ignore":
        return Tiers([plain])
    if applied is None:
        applied = getattr(decoder(model).rotary_emb, "tiers", None)
    if applied is not None:
        return Tiers(applied)
    return Tiers([plain if rope.loaded is None or rope.rope_type == "default" else rope.loaded])


def stage_of(tiers: Tiers) -> RescaleFactors | None:
    """Return what candidates multiply: the last of the tiers; None where it changes nothing.

    Raises `ValueError` where its layers or heads have factors of their own.
    """
    last = tiers[-1]
    if last.per_head:
        raise ValueError(
            "model: expected factors for all layers and heads alike to search on top of, got those "
            "of each; apply one_set() of them, or give scaling='ignore'"
        )
    if np.all(last.lambdas == 1) and last.attention_factor == 1:
        return None
    return last
