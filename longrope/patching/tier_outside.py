"""Tiers by position in a compiled pass whose cache grows: outside the graphs of `torch.compile`.

The sizes of such a cache, and the tiers of its tokens, are decided on the host in every pass. So
the pass breaks into graphs: before the decoder, and at each layer's cache and attention. Imported
where a model is compiled: it imports the compiler.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from longrope.patching import tier_attention, tiered
from longrope.patching.tier_cache import Cached
from longrope.patching.tier_rotation import Unturned
from longrope.patching.torch_attention import Options

#: What a user reads who asks for one graph.
_REASON = (
    "cache: expected use_cache=False, or a StaticCache that has been through a pass that was not "
    "compiled, under tiers by position with fullgraph=True"
)
plan_pass = torch.compiler.disable(tiered.plan_pass, reason=_REASON)
forget_pass = torch.compiler.disable(tiered.forget_pass, reason=_REASON)


@torch.compiler.disable(reason=_REASON)
def attend(query: Unturned, key: Cached, value: Tensor, options: Options, index: int) -> Tensor:
    """Return the attention of a pass in a layer, `[B, H, N, D]`, as `tier_attention.attend`."""
    rotary = tiered.module_of(query.rotation.ticket)
    plan, shift = tiered.passing(rotary)
    settings = None if plan.tier is None else rotary.settings(plan.tier)
    plan = dataclasses.replace(plan, own=False)  # the layers were asked to turn
    rotation = query.rotation._replace(plan=plan, shift=shift, settings=settings)
    query = query._replace(rotation=rotation)
    key = key._replace(new=key.new._replace(rotation=rotation))
    return tier_attention.attend(query, key, value, rotary, options, index)
