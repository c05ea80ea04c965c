"""Cache layers for tiers by position: keys in the form that the row's newest tier reads.

A key is cached turned by the tier of its row's newest token, and turned in place when the row
enters the next tier (`keys="turned"`), or un-rotated from the second tier on and turned whenever
it is read (`keys="unrotated"`). In the first tier it is what the model itself caches. The layers
take the place of transformers' own ones while they are empty, so whatever makes a cache
(`generate`, a user) need not know about tiers.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longrope.patching.families import attention_layers, window_of
from longrope.patching.settings import text_config

#: Keys of this form are un-rotated; a form of 0 or more is the tier that keys are turned by.
UNROTATED = -1

#: Attribute of a cache whose layers follow tiers: the signature of these.
_ADOPTED = "_longrope_tiers"

#: A growing layer takes memory for so much more than it holds, so that most tokens copy nothing.
_GROWTH = 1.25
_LEAST_ROOM = 64


class Cached(NamedTuple):
    """What the cache layer of tiers hands an attention layer in the place of its keys."""

    layer: Any
    new: Any  # the keys of this pass before their rotation
    start: Any  # tokens in the cache before this pass: an int, or a tensor of a static cache

    @property
    def device(self) -> torch.device:
        return self.new.device


class TierMixin:
    """What growing and static layers share: the form of the keys and where they stand.

    Attributes
    ----------
    form
        int64 `[B]` on the CPU, of each row's keys.
    positions
        int64 `[B, n]`, of the keys; beside `keys` `[B, Hk, n, D]` and `values`.
    """

    is_quantized = False

    def prepare(self, rotary: nn.Module) -> None:
        """Belong to a rotary module; called once, while the layer is empty."""
        self.rotary, self.signature = rotary.ticket, rotary.signature
        self.form: Tensor | None = None
        self.positions: Tensor | None = None
        #: Positions of the tokens to come, while the model's own attention runs.
        self.incoming: Tensor | None = None

    def update(self, key_states: Any, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Take keys that the model has turned, or (before their rotation) hand over to attention.

        The first in passes that the model computes itself: then return all keys and values.
        """
        if isinstance(key_states, Tensor):
            if self.incoming is None:
                raise ValueError(
                    "cache: expected one that was filled without tiers, got one of a model with "
                    "tiers applied; start from an empty cache after longrope.remove"
                )
            if torch.is_grad_enabled() and (key_states.requires_grad or self.has_gradient()):
                self.join(key_states, value_states, self.incoming)
                return self.keys, self.values
            start = self.held()
            self.make_room(key_states, value_states)
            self.write(start, key_states, value_states, self.incoming)
            self.hold(start + key_states.shape[2])
            return self.keys, self.values
        start = self.held()
        self.make_room(key_states.states, value_states)
        self.hold(start + value_states.shape[2])  # attention writes them
        return Cached(self, key_states, start), value_states

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows of a beam search's new order."""
        if self.held():
            self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Take every row `repeats` times."""
        if self.held():
            self.map_rows(lambda x: x.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Take the rows of `indices`."""
        if self.held():
            self.map_rows(lambda x: x[indices.to(x.device), ...])

    def offload(self) -> None:
        raise ValueError(
            "cache: expected one that stays on its device under tiers by position, got one that "
            "is offloaded"
        )


@functools.cache
def layer_types() -> tuple[type, type]:
    """Return our growing and our static layer; transformers is imported late."""
    from transformers.cache_utils import DynamicLayer, StaticLayer

    class TierLayer(TierMixin, DynamicLayer):
        """Keys and values `[B, Hk, n, D]` are views of the first places of larger rooms."""

        is_compileable = False
        #: Its sizes change with every pass: outside the graphs of `torch.compile`.
        update = torch.compiler.disable(TierMixin.update)

        def held(self) -> int:
            return 0 if self.keys is None or self.keys.dim() < 4 else self.keys.shape[2]

        def get_seq_length(self, *_: Any) -> int:
            return self.held()

        def make_room(self, keys: Tensor, values: Tensor) -> None:
            """Take memory for the tokens of a pass; what is held is copied when it must grow."""
            if not self.is_initialized:
                # What lazy_initialization sets, whose arguments differ between versions.
                self.dtype, self.device = keys.dtype, keys.device
                self.is_initialized = True
                self.keys, self.values = keys[:, :, :0], values[:, :, :0]
                self.form = torch.zeros(len(keys), dtype=torch.int64)
                self.positions = torch.empty(len(keys), 0, dtype=torch.int64, device=keys.device)
            start, count = self.held(), keys.shape[2]
            if start + count <= self.room():
                return
            room = max(_LEAST_ROOM, int(_GROWTH * start) + count, getattr(self, "reserved", 0))
            rooms = []
            for old in (self.keys, self.values, self.positions):
                shape = list(old.shape)
                shape[-2 if old.dim() == 4 else -1] = room
                new = old.new_empty(shape)
                (new[:, :, :start] if old.dim() == 4 else new[:, :start]).copy_(old)
                rooms.append(new)
            self._rooms = tuple(rooms)
            self.hold(start)

        def room(self) -> int:
            """Return how many tokens fit without new memory."""
            rooms = getattr(self, "_rooms", None)
            return 0 if rooms is None else rooms[2].shape[1]

        def write(self, start: int, keys: Tensor, values: Tensor, positions: Tensor) -> None:
            """Put the tokens of a pass behind the first `start`; `hold` makes them count."""
            end = start + keys.shape[2]
            for room, new in zip(self._rooms[:2], (keys, values), strict=True):
                room[:, :, start:end] = new
            self._rooms[2][:, start:end] = positions

        def has_gradient(self) -> bool:
            return self.keys is not None and self.keys.requires_grad

        def join(self, keys: Tensor, values: Tensor, positions: Tensor) -> None:
            """Hold also the tokens of a pass through which gradients flow: nothing in place."""
            if not self.is_initialized:
                self.make_room(keys[:, :, :0], values[:, :, :0])
            self.keys = torch.cat([self.keys, keys], 2)
            self.values = torch.cat([self.values, values], 2)
            self.positions = torch.cat([self.positions, positions], 1)
            self._rooms = (self.keys, self.values, self.positions)

        def storage(self) -> tuple[Tensor, Tensor, Tensor]:
            """Return the rooms of keys, values and positions."""
            return self._rooms

        def hold(self, tokens: int) -> None:
            """Make what the layer holds the first `tokens` that were written."""
            keys, values, positions = self._rooms
            self.keys, self.values = keys[:, :, :tokens], values[:, :, :tokens]
            self.positions = positions[:, :tokens]

        def map_rows(self, change: Any) -> None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.positions, self.form = change(self.positions), change(self.form)
            self._rooms = (self.keys, self.values, self.positions)

        def reset(self) -> None:
            self.keys = self.values = self.positions = self.form = None
            self.is_initialized = False
            self._rooms = None

        def crop(self, tokens: int) -> None:
            """Forget the last `-tokens` tokens (4.57: all but the first `tokens`)."""
            if not self.is_initialized or tokens == 0:
                return
            kept = self.held() + tokens if tokens < 0 else tokens
            if kept < self.held():
                self.hold(max(0, kept))

    class TierStaticLayer(TierMixin, StaticLayer):
        """A layer of fixed size, for `torch.compile`; the form and positions lie beside it."""

        def held(self) -> int:
            return int(self.get_seq_length())

        def make_room(self, keys: Tensor, values: Tensor) -> None:
            if not self.is_initialized:
                count = len(inspect.signature(self.lazy_initialization).parameters)
                self.lazy_initialization(*(keys, values)[:count])  # 4.57: keys alone
            if self.form is None:
                self.form = torch.zeros(len(keys), dtype=torch.int64)
                shape = (len(keys), self.keys.shape[2])
                self.positions = torch.zeros(shape, dtype=torch.int64, device=keys.device)

        def storage(self) -> tuple[Tensor, Tensor, Tensor]:
            return self.keys, self.values, self.positions

        def update(self, key_states: Any, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if isinstance(key_states, Tensor):
                return super().update(key_states, value_states)  # refuses
            self.make_room(key_states.states, value_states)
            count = value_states.shape[2]
            if not torch.compiler.is_compiling() and self.held() + count > self.keys.shape[2]:
                raise ValueError(
                    f"cache: expected room for {self.held() + count} tokens, got a StaticCache of "
                    f"{self.keys.shape[2]}"
                )
            before = self.count().clone()
            self.count().add_(value_states.shape[2])
            return Cached(self, key_states, before), value_states

        def count(self) -> Tensor:
            """Return the tensor that counts the tokens; 4.57 has none."""
            if not hasattr(self, "cumulative_length"):
                self.cumulative_length = torch.tensor(0, device=self.keys.device)
            return self.cumulative_length

        def get_seq_length(self, *_: Any) -> Any:
            return self.count() if self.is_initialized else 0

        def map_rows(self, change: Any) -> None:
            for name in ("keys", "values", "positions", "form"):
                setattr(self, name, change(getattr(self, name)))

        def reset(self) -> None:
            super().reset()
            if self.form is not None:
                self.form.zero_()

    return TierLayer, TierStaticLayer


@functools.cache
def _as_loaded(kind: type) -> type:
    """Return a cache layer for attention whose window lies within the first tier.

    It caches the keys as the model turns them. With the one base alone, an empty layer of that type
    can become one.
    """

    def update(self: Any, key_states: Any, value_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(key_states, Tensor):
            key_states = key_states.turned_by_model()
        return kind.update(self, key_states, value_states, *args, **kwargs)

    return type(f"Loaded{kind.__name__}", (kind,), {"update": update, "as_loaded": True})


def stays_as_loaded(attention: nn.Module, first_limit: int) -> bool:
    """Say whether a layer is left to the model: its window lies within the first tier."""
    window = window_of(attention)
    return window is not None and window <= first_limit


def adopt(cache: Any, base: nn.Module) -> Any:
    """Make a transformers cache one whose keys follow the tiers of a decoder; returns it.

    Empty layers are replaced, layers of the same tiers are kept.

    Raises
    ------
    ValueError
        Where the cache holds tokens of another rotation, or a layer cannot be turned.
    """
    rotary = base.rotary_emb
    if getattr(cache, _ADOPTED, None) == rotary.signature:
        return cache
    from transformers.cache_utils import (
        DynamicLayer,
        DynamicSlidingWindowLayer,
        StaticLayer,
        StaticSlidingWindowLayer,
    )

    from longrope.patching.tier_cache_quantized import is_quantized, quantized

    growing, static = layer_types()
    layers = getattr(cache, "layers", None)
    if layers is None or getattr(cache, "offloading", False):
        raise ValueError(
            "cache: expected a cache of transformers whose keys can be turned under tiers by "
            f"position, got {'an offloaded ' * (layers is not None)}{type(cache).__name__}"
        )
    attentions = attention_layers(base)
    if getattr(cache, "layer_class_to_replicate", None) is not None and len(layers) == 0:
        layers.extend(cache.layer_class_to_replicate() for _ in attentions)
    first_limit = rotary.tiers.limits[0]
    for index, (layer, attention) in enumerate(zip(layers, attentions, strict=False)):
        if isinstance(layer, TierMixin):
            if layer.signature != rotary.signature and layer.held():
                raise ValueError(
                    "cache: expected one that was filled under the tiers that are applied, got "
                    "keys of others; start from an empty cache"
                )
            if layer.signature != rotary.signature:
                layer.reset()
                layer.prepare(rotary)
            continue
        if getattr(layer, "as_loaded", False) or not getattr(attention, "use_rope", True):
            continue  # caches what the model turns, or no rotation
        if layer.is_initialized and int(layer.get_seq_length()):
            raise ValueError(
                "cache: expected an empty cache, or one that was filled under the tiers that are "
                f"applied, got {int(layer.get_seq_length())} tokens of unknown rotation"
            )
        if stays_as_loaded(attention, first_limit):
            layer.__class__ = _as_loaded(type(layer))  # empty: nothing but settings is in it
            continue
        new = None
        if is_quantized(layer):
            new = quantized(layer)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer):
            new = growing()
        elif type(layer) is StaticLayer:
            new = static(layer.max_cache_len)
        elif type(layer) is StaticSlidingWindowLayer and layer.max_cache_len < window_of(attention):
            new = static(layer.max_cache_len)  # shorter than the window: nothing slides out
        if new is None:
            raise ValueError(
                "cache: expected layers whose keys can be turned under tiers by position "
                "(DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, a quantised one), got "
                f"{type(layer).__name__}"
            )
        new.prepare(rotary)
        layers[index] = new
    setattr(cache, _ADOPTED, rotary.signature)
    return cache


def is_ready(cache: Any, rotary: nn.Module) -> bool:
    """Say whether a compiled pass may use a cache: one of fixed size that a pass has prepared."""
    return getattr(cache, _ADOPTED, None) == rotary.signature and getattr(
        cache, "is_compileable", False
    )


def new_cache(base: nn.Module, length: int | None = None) -> Any:
    """Return an empty growing cache for a decoder, with room for `length` tokens from the start."""
    from transformers import DynamicCache

    cache = adopt(DynamicCache(config=text_config(base)), base)
    if length is not None:
        for layer in cache.layers:
            layer.reserved = length
    return cache


def tiered_layers(cache: Any) -> list[Any]:
    """Return the layers of a cache (or of anything) whose keys follow the tiers."""
    return [layer for layer in getattr(cache, "layers", ()) if isinstance(layer, TierMixin)]
