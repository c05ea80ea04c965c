"""Quantised cache layers under tiers by position: un-rotated keys, turned whenever they are read.

Keys that are turned in place would be rounded to a few bits again at every crossing. So whatever
quantises (transformers' quanto, HQQ and FP8 layers, a user's own) is given keys before their
rotation, in the first tier too, and its states are never rewritten by a crossing.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longrope.patching.tier_cache import UNROTATED, Cached, TierMixin


class QuantizedTierMixin(TierMixin):
    """What makes an empty quantised layer of transformers one that holds un-rotated keys."""

    is_quantized = True

    def held(self) -> int:
        return int(self.get_seq_length())

    def prepare(self, rotary: Any) -> None:
        super().prepare(rotary)
        # Never the form of the first tier: no pass is left to the model, which would turn the keys.
        self.form = torch.full((1,), UNROTATED)

    def update(self, key_states: Any, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if isinstance(key_states, Tensor):
            return super().update(key_states, value_states)  # refuses
        return Cached(self, key_states, self.held()), value_states

    def exchange(
        self, keys: Tensor, values: Tensor, positions: Tensor
    ) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor]]:
        """Quantise the tokens of a pass beside what is held.

        Returns the form of the keys, int64 `[B]`, and all of them, un-rotated, as plain tensors:
        keys and values `[B, Hk, n, D]` and their positions `[B, n]`. The keys may be written to.
        """
        old = self.positions
        self.positions = positions if old is None else torch.cat([old, positions], 1)
        everything = super(TierMixin, self).update(keys, values)
        form = torch.full((len(keys),), UNROTATED)
        return form, (everything[0].clone(), everything[1], self.positions)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        if not self.held():
            return
        if _reorders_plainly(type(self)):
            self._refuse("for beam search with this transformers")
        super(TierMixin, self).reorder_cache(beam_idx)
        self.positions = self.positions.index_select(0, beam_idx.to(self.positions.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.held():
            self._refuse("where its rows are repeated")

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.held():
            self._refuse("where its rows are selected")

    def crop(self, tokens: int) -> None:
        if self.held() and tokens:
            self._refuse("where it is cropped")

    def reset(self) -> None:
        self.positions = None
        self.keys = self.values = None
        self._quantized_keys = self._quantized_values = None
        self.is_initialized = False
        self.cumulative_length = 0

    def _refuse(self, where: str) -> None:
        kind = type(self).__name__
        raise ValueError(f"cache: expected one that is not quantised {where}, got {kind}")


@functools.cache
def _reorders_plainly(kind: type) -> bool:
    """Say whether a layer's reordering knows nothing of quantised states, as before 5.24."""
    from transformers.cache_utils import CacheLayerMixin, DynamicLayer

    plain = (CacheLayerMixin.reorder_cache, DynamicLayer.reorder_cache)
    own = kind.__mro__[kind.__mro__.index(TierMixin) + 1 :]
    return next(c.reorder_cache for c in own if "reorder_cache" in vars(c)) in plain


@functools.cache
def _under_tiers(kind: type) -> type:
    """Return the type of a quantised layer of `kind` under tiers, by the same name."""
    return type(kind.__name__, (QuantizedTierMixin, kind), {})


def quantized(layer: Any) -> QuantizedTierMixin:
    """Return a layer that quantises as an empty one of transformers does, for tiers."""
    kind = _under_tiers(type(layer))
    new = kind.__new__(kind)
    vars(new).update(vars(layer))
    return new


def is_quantized(layer: Any) -> bool:
    """Say whether a cache layer of transformers holds quantised states."""
    return hasattr(layer, "_quantize") and hasattr(layer, "_dequantize")
