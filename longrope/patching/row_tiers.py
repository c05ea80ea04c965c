"""Choosing a tier for each row of a batch, and keeping cached keys right when a row changes tier.

Keys are cached after their rotation. When a row grows out of its tier (or a cache is cropped back
into it), the keys of that row are turned in place by the difference of the two rotations before
the new tokens attend them. What deeper layers cached was computed from hidden states under the
old factors: turning is exact for the rotation, and it is not the same as running the whole text
again under the new factors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longrope import ops
from longrope.factors import RescaleFactors
from longrope.patching.embedding import RescaledRotaryEmbedding
from longrope.patching.rotation import DEVICES_WITH_KERNELS
from longrope.patching.tier_pass import arguments_of, tokens_and_cached

#: Cache layers whose keys lie as `[B, Hk, M, D]`, oldest first: all tokens, or the last ones.
_TURNABLE_LAYERS = ("DynamicLayer", "DynamicSlidingWindowLayer", "StaticLayer")

_STATE = "_longrope_keys"


class CachedKeys(NamedTuple):
    """What is known of the keys in a cache: the factors of each row, where each token stands."""

    factors: tuple[RescaleFactors, ...]
    positions: tuple[Tensor, ...]  # each int64 [B, n], one for each forward pass


def install(base: nn.Module, rotary: RescaledRotaryEmbedding) -> None:
    """Make `base`, a decoder, find out the tiers of its rows before it runs."""
    if len(rotary.tiers) > 1:
        rotary.hooks = (
            base.register_forward_pre_hook(_before, with_kwargs=True),
            base.register_forward_hook(_after, with_kwargs=True, always_call=True),
        )


class Pass(NamedTuple):
    """One forward pass of a decoder, as its hooks see it."""

    positions: Tensor  # int64 [B, N]
    lengths: Tensor  # int64 [B], of the rows when the pass is done
    cache: Any
    cached: int  # tokens in the cache before the pass


def _read(args: tuple, kwargs: dict) -> Pass:
    given = arguments_of(args, kwargs)
    tokens, cached = tokens_and_cached(given)
    batch, count = tokens.shape[:2]
    cache = given.get("cache")
    mask = given.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        mask = None
    positions = given.get("position_ids")
    if positions is None:
        # The model numbers padding too, but a row is as long as it has tokens.
        positions = torch.arange(cached, cached + count, device=tokens.device).expand(batch, count)
        lengths = positions[:, -1] + 1 if mask is None else mask.sum(-1)
    else:
        positions = positions.expand(batch, count)
        real = positions if mask is None else positions.where(mask[:, -count:] != 0, 0)
        lengths = real.amax(-1) + 1
    return Pass(positions, lengths, cache, cached)


def _before(base: nn.Module, args: tuple, kwargs: dict) -> None:
    rotary = base.rotary_emb
    if not isinstance(rotary, RescaledRotaryEmbedding) or rotary.rows is not None:
        return
    call = _read(args, kwargs)
    lengths = call.lengths if rotary.planned_lengths is None else rotary.planned_lengths
    rotary.tier = rotary.tier_of(lengths.to(call.lengths.device)).expand(len(call.positions))
    factors = tuple(rotary.tiers[tier] for tier in rotary.tier.tolist())
    positions = (call.positions,)
    if call.cached:
        keys = _known_keys(call)
        _turn_cache(call, keys, factors)
        positions = keys.positions + positions
    rotary.cached_keys = CachedKeys(factors, positions)


def _after(base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    rotary = base.rotary_emb
    if not isinstance(rotary, RescaledRotaryEmbedding):
        return
    keys, rotary.cached_keys, rotary.tier = rotary.cached_keys, None, None
    outputs = output if isinstance(output, tuple) else getattr(output, "values", tuple)()
    for cache in outputs:
        if keys is not None and hasattr(cache, "get_seq_length"):
            setattr(cache, _STATE, keys)


def _known_keys(call: Pass) -> CachedKeys:
    """Return what is known of the keys in the cache, for the batch of this pass."""
    keys, batch = getattr(call.cache, _STATE, None), len(call.positions)
    if keys is None or sum(chunk.shape[1] for chunk in keys.positions) < call.cached:
        raise ValueError(
            "past_key_values: expected a cache that this model filled with its present tiers "
            f"applied, got {call.cached} tokens of unknown rotation; start from an empty cache"
        )
    repeats, rest = divmod(batch, len(keys.factors))
    if rest or not repeats:
        raise ValueError(
            f"past_key_values: expected a cache of the {len(keys.factors)} rows that filled it, "
            f"or of copies of each, got {batch}"
        )
    positions = keys.positions
    if repeats > 1:  # beams of a prompt that was read once
        positions = tuple(chunk.repeat_interleave(repeats, 0) for chunk in positions)
    if sum(chunk.shape[1] for chunk in positions) > call.cached:  # cropped since
        positions = (torch.cat(positions, 1)[:, : call.cached],)
    factors = tuple(row for row in keys.factors for _ in range(repeats))
    return CachedKeys(factors, positions)


@torch.no_grad()
def _turn_cache(call: Pass, keys: CachedKeys, factors: tuple[RescaleFactors, ...]) -> None:
    """Turn the cached keys of the rows whose factors change, in place."""
    changed = [
        (row, old, new)
        for row, (old, new) in enumerate(zip(keys.factors, factors, strict=True))
        if old is not new and old != new
    ]
    if not changed:
        return
    positions = torch.cat(keys.positions, 1)
    for index, layer in enumerate(call.cache.layers):
        if type(layer).__name__ not in _TURNABLE_LAYERS:
            raise ValueError(
                "past_key_values: expected cache layers of the types "
                f"{', '.join(_TURNABLE_LAYERS)}, whose keys can be turned when a row changes tier, "
                f"got {type(layer).__name__}"
            )
        # A static layer has room behind its tokens, a sliding one holds the last of them.
        held = layer.keys[:, :, : call.cached]
        at = positions[:, call.cached - held.shape[2] :].to(held.device)
        turn = ops if held.device.type in DEVICES_WITH_KERNELS else ops.reference
        for row, old, new in changed:
            row_keys = held[row : row + 1]
            sets = old.layer(index), new.layer(index)
            turn.rerotate(row_keys, at[row : row + 1], *sets, out=row_keys)
