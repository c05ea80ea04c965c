"""A key/value cache for windows that go through a model in chunks."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

from longrope.patching.settings import text_config


def window_cache(model: Any, length: int) -> Any:
    """Return an empty transformers cache with room for `length` tokens in each row.

    Memory for all of them is taken at the first chunk, and each chunk is written behind the one
    before it: transformers' own growing layers copy what they hold at every chunk, and its layers
    of fixed size hand out their unused room too, which a mask has to hide. Layers with a sliding
    window are transformers' own, which hold no more than the window.
    """
    from transformers import DynamicCache

    cache = DynamicCache(config=text_config(model))
    plain, own = _layer_types()
    cache.layers = [own(length) if type(layer) is plain else layer for layer in cache.layers]
    return cache


@functools.cache
def _layer_types() -> tuple[type, type]:
    """Return transformers' growing layer and ours; `import longrope` does not need transformers."""
    from transformers.cache_utils import DynamicLayer

    class PreallocatedLayer(DynamicLayer):
        """Keys and values `[B, Hk, n, D]` are views of the first places of `[B, Hk, length, D]`.

        Everything but `update` is inherited: what holds for the views holds for any keys.
        """

        def __init__(self, length: int):
            super().__init__()
            self.length = length

        def update(
            self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any
        ) -> tuple[Tensor, Tensor]:
            """Write new keys and values behind the others; return all of them."""
            held = self.get_seq_length()
            if not held:
                # What their lazy_initialization sets, whose arguments differ between versions.
                self.dtype, self.device = key_states.dtype, key_states.device
                self.is_initialized = True
                self._room = tuple(
                    states.new_empty(*states.shape[:2], self.length, states.shape[3])
                    for states in (key_states, value_states)
                )
            end = held + key_states.shape[2]
            if end > self.length:
                raise ValueError(f"cache: expected at most {self.length} tokens, got {end}")
            for room, states in zip(self._room, (key_states, value_states), strict=True):
                room[:, :, held:end] = states
            self.keys, self.values = (room[:, :, :end] for room in self._room)
            return self.keys, self.values

    return DynamicLayer, PreallocatedLayer
