"""A key/value cache for windows that go through a model in chunks, forwards and backwards."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from longrope.patching.families import decoder
from longrope.patching.settings import text_config
from longrope.patching.tier_cache import new_cache
from longrope.patching.tier_rotation import Unturned
from longrope.patching.tiered import TieredRotaryEmbedding


def window_cache(model: Any, length: int) -> Any:
    """Return an empty transformers cache with room for `length` tokens in each row.

    Memory for all of them is taken at the first chunk, and each chunk is written behind the one
    before it: transformers' own growing layers copy what they hold at every chunk, and its layers
    of fixed size hand out their unused room too, which a mask has to hide. Layers with a sliding
    window are transformers' own, which hold no more than the window.
    """
    from transformers import DynamicCache

    base = decoder(model)
    if isinstance(base.rotary_emb, TieredRotaryEmbedding):
        return new_cache(base, length)
    cache = DynamicCache(config=text_config(model))
    plain, own = _layer_types()
    cache.layers = [own(length) if type(layer) is plain else layer for layer in cache.layers]
    return cache


def differentiable_cache(model: Any, length: int) -> Any:
    """Return a cache like `window_cache`'s through which gradients flow from chunk to chunk.

    The chunks have gone through the model once, and go through it again from the last to the first,
    each followed by its backward pass: `rewind(cache, start)` before the chunk from `start` on.
    What later queries leave for a chunk's keys and values waits beside them, until the backward
    pass of that chunk takes it up. Layers with a sliding window hold all tokens too; their
    attention skips what the window hides.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=text_config(model))
    own = _layer_types()[1]
    cache.layers = [own(length, differentiable=True) for _ in cache.layers]
    return cache


def rewind(cache: Any, tokens: int) -> None:
    """Make a cache of `differentiable_cache` one that holds the first `tokens` again."""
    for layer in cache.layers:  # their `crop` means other things in other versions
        layer.hold(tokens)


class _Append(torch.autograd.Function):
    """Write states behind those that a room holds; return all of them.

    The gradient of the result is that of this chunk's queries alone: its early part is added to
    what the room keeps for the chunks before, and what later chunks left for the new states is
    added to theirs.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, room: _Room, start: int) -> Tensor:
        ctx.room, ctx.start = room, start
        return room.append(states, start)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        waiting, start, end = ctx.room.gradient, ctx.start, gradient.shape[2]
        waiting[:, :, :start] += gradient[:, :, :start]
        waiting[:, :, start:end] += gradient[:, :, start:]
        return waiting[:, :, start:end], None, None


class _Room:
    """Memory for the keys (or the values) of `length` tokens, `[B, Hk, length, D]`.

    Not a tensor itself: autograd takes no notice of what is written into it.
    """

    def __init__(self, states: Tensor, length: int, differentiable: bool):
        shape = (*states.shape[:2], length, states.shape[3])
        self.states = states.new_empty(shape)
        #: The gradient that later chunks have left.
        self.gradient = None
        if differentiable:
            # In the states' dtype: the latest queries, whose share is least, come first, and the
            # gradient of 64 chunks in bfloat16 was as good as that of a whole window.
            self.gradient = states.new_zeros(shape)

    def append(self, states: Tensor, start: int) -> Tensor:
        """Write states at `start`; return a view of all up to their end."""
        end = start + states.shape[2]
        self.states[:, :, start:end] = states
        return self.states[:, :, :end]


@functools.cache
def _layer_types() -> tuple[type, type]:
    """Return transformers' growing layer and ours; `import longrope` does not need transformers."""
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Keys and values `[B, Hk, n, D]` are views of the first places of `[B, Hk, length, D]`.

        Everything but `update` is inherited: what holds for the views holds for any keys.
        """

        def __init__(self, length: int, differentiable: bool = False):
            super().__init__()
            self.length = length
            self.differentiable = differentiable

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            """Write new keys and values behind the others; return all of them."""
            start = self.get_seq_length()
            self._make_rooms(key_states, value_states)
            end = start + key_states.shape[2]
            if end > self.length:
                raise ValueError(f"cache: expected at most {self.length} tokens, got {end}")
            joined = [
                _Append.apply(states, room, start)
                if self.differentiable and torch.is_grad_enabled()
                else room.append(states, start)
                for room, states in zip(self._rooms, (key_states, value_states), strict=True)
            ]
            self.hold(end)
            return tuple(joined)

        def begin(self, keys: Tensor, values: Tensor) -> None:
            """Hold these, in an empty layer: no gradient flows into them."""
            self._make_rooms(keys, values)
            for room, states in zip(self._rooms, (keys, values), strict=True):
                room.append(states, 0)
            self.hold(keys.shape[2])

        def _make_rooms(self, keys: Tensor, values: Tensor) -> None:
            if not self.is_initialized:
                # What their lazy_initialization sets, whose arguments differ between versions.
                self.dtype, self.device = keys.dtype, keys.device
                self.is_initialized = True
                self._rooms = [
                    _Room(states, self.length, self.differentiable) for states in (keys, values)
                ]

        def hold(self, tokens: int) -> None:
            """Make what the layer holds the first `tokens` that were written."""
            self.keys, self.values = (room.states[:, :, :tokens] for room in self._rooms)

    return DynamicLayer, PreallocatedLayer


@functools.cache
def held_layer_type() -> type:
    """Return the layer of a `longrope.patching.ranges.range_cache`."""

    class RangeLayer(_layer_types()[1]):
        """Keys lie as they are before their rotation; with `as_loaded` as the model turns them."""

        def __init__(self, length: int, differentiable: bool = False, as_loaded: bool = False):
            super().__init__(length, differentiable)
            self.as_loaded = as_loaded

        def update(
            self, key_states: Any, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Any, Tensor]:
            """Write new keys and values behind the others; return all of them, still unturned."""
            if not isinstance(key_states, Unturned):
                return super().update(key_states, value_states)
            if self.as_loaded:
                return super().update(key_states.turned_by_model(), value_states)
            keys, values = super().update(key_states.states, value_states)
            return key_states._replace(states=keys), values

    return RangeLayer
