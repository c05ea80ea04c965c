"""A range of positions alone: its tokens go through the model, those before it are held.

Under tiers by position the states of the tokens below a tier's range do not depend on that tier's
factors. So the keys and values of this prefix are computed once, and kept before their rotation;
the tokens of the range then attend them under any factors, which turn both: another candidate, or
a gradient with respect to it, takes the range's tokens alone.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longrope.factors import RescaleFactors, Tiers
from longrope.patching import layers, plain_attention
from longrope.patching.apply import without_factors
from longrope.patching.attention import kernel_attention
from longrope.patching.embedding import bits
from longrope.patching.families import attention_layers, decoder
from longrope.patching.rotation import KernelRotation, accept_rotations
from longrope.patching.settings import rope_settings
from longrope.patching.tier_cache import stays_as_loaded
from longrope.patching.tier_rotation import Unturned, turning_by
from longrope.patching.tiered import loaded_tier
from longrope.patching.window_cache import held_layer_type


class RangeRotation(NamedTuple):
    """What the layers get in place of cosines and sines.

    `cos` and `sin` are the model's own, of the tokens of the pass. `queries` and `keys` turn these
    tokens, and all tokens up to the last of them, by the factors in force; where the model itself
    turns, `queries` is None and `keys` are its own cosines and sines.
    """

    cos: Tensor
    sin: Tensor
    queries: KernelRotation | None
    keys: KernelRotation | tuple[Tensor, Tensor]

    def postpone(self, q: Tensor, k: Tensor, original: Callable) -> tuple[Unturned, Unturned]:
        """Let the attention function turn them, when the keys of the prefix have joined."""
        turn = turning_by(original)
        return Unturned(q, self, turn), Unturned(k, self, turn)

    def of_layer(self, layer: int) -> RangeRotation:
        """Return the rotation of one layer."""
        if self.queries is None:
            return self
        return self._replace(queries=self.queries.of_layer(layer), keys=self.keys.of_layer(layer))

    def turned(self, query: Unturned, key: Unturned) -> tuple[Tensor, Tensor]:
        """Return queries `[B, H, n, D]` and keys `[B, Hk, M, D]`, turned."""
        if self.queries is None:
            return query.turned_by_model(), key.turn(key.states, *self.keys)
        q, k = query.states, key.states
        return self.queries.rotate(q, q[:, :0])[0], self.keys.rotate(k, k[:, :0])[0]


class RangeRotaryEmbedding(nn.Module):
    """The rotary module inside `ranges`; one of the `turn` methods says what is in force."""

    def __init__(self, original: nn.Module, base_inv_freq: np.ndarray):
        super().__init__()
        self.original = original
        self.register_buffer("base_bits", bits(base_inv_freq), persistent=False)
        self.settings: tuple | None = None

    def turn_as_loaded(self) -> None:
        """Let the model's own rotary module turn."""
        self.settings = None

    def turn_by(
        self,
        inv_freq: Tensor,
        start_tokens: int | Tensor = 0,
        attention_factor: float | Tensor = 1.0,
    ) -> None:
        """Turn by factors: `inv_freq` float64 `[R/2]`, or `[B, R/2]` with the others `[B]`.

        By layer and group of heads `[L, B or 1, G, R/2]`, with `attention_factor` `[L, B or 1, G]`.
        Gradients flow into the frequencies and the attention factor.
        """
        self.settings = inv_freq, start_tokens, attention_factor

    def turn_by_factors(self, factors: RescaleFactors) -> None:
        """Turn all rows by one set of factors."""
        inv_freq, factor = torch.from_numpy(factors.inv_freq()), factors.attention_factor
        if factors.per_head:
            inv_freq, factor = inv_freq[:, None], torch.tensor(factor)[:, None]
        self.turn_by(inv_freq, factors.start_tokens, factor)

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **_: Any
    ) -> tuple[Any, Any]:
        """Return what the layers unpack as `cos, sin`; `position_ids` int64 `[1, n]`."""
        kind = () if layer_type is None else (layer_type,)
        cos, sin = self.original(x, position_ids, *kind)
        if layer_type not in (None, "full_attention"):
            return cos, sin
        at = position_ids[0].to(x.device)
        up_to = torch.arange(int(at[-1]) + 1, device=x.device)
        if self.settings is None:
            return RangeRotation(cos, sin, None, self.original(x, up_to[None], *kind)), None
        inv_freq, start_tokens, attention_factor = (
            s.to(x.device) if isinstance(s, Tensor) else s for s in self.settings
        )
        base = self.base_bits.to(x.device).view(torch.float64)
        settings = inv_freq, start_tokens, base, attention_factor
        queries, keys = (KernelRotation(positions, *settings) for positions in (at, up_to))
        return RangeRotation(cos, sin, queries, keys), None


@contextlib.contextmanager
def ranges(model: nn.Module) -> Iterator[RangeRotaryEmbedding]:
    """Inside the block, tokens attend those that a `range_cache` holds under any factors.

    The model's attention layers run `ops.attention` (`has_kernel_attention` says whether they can),
    and passes must come with such a cache and with `position_ids` that continue it. Factors that
    are applied to the model are back in force after the block.
    """
    with without_factors(model) as base:
        own = base.rotary_emb
        accept_rotations(attention_layers(base)[0])
        settings = rope_settings(model)
        plain = RescaleFactors.none(**settings.lengths(settings.original_length))
        base.rotary_emb = RangeRotaryEmbedding(own, plain.base_inv_freq())
        picking = layers.install(base)
        try:
            with kernel_attention(model, _attend):
                yield base.rotary_emb
        finally:
            for hook in picking:
                hook.remove()
            base.rotary_emb = own


def range_cache(
    model: nn.Module, length: int, first_limit: int, differentiable: bool = False
) -> Any:
    """Return an empty cache for passes inside `ranges`, with room for `length` tokens.

    Layers whose sliding window lies within the first tier, `first_limit` tokens, stay as loaded:
    they hold keys as the model turns them. With `differentiable` gradients flow from chunk to
    chunk, see `longrope.patching.window_cache.differentiable_cache`.
    """
    from transformers import DynamicCache

    from longrope.patching.settings import text_config

    cache = DynamicCache(config=text_config(model))
    kind = held_layer_type()
    cache.layers = [
        kind(length, differentiable, stays_as_loaded(attention, first_limit))
        for attention in attention_layers(decoder(model))
    ]
    return cache


def joined(prefixes: Sequence[Any], into: Any) -> Any:
    """Make the prefixes of single rows, caches of one length, the rows of an empty cache."""
    for index, layer in enumerate(into.layers):
        rows = [prefix.layers[index] for prefix in prefixes]
        layer.begin(torch.cat([r.keys for r in rows]), torch.cat([r.values for r in rows]))
    return into


def turned_as_loaded(model: nn.Module, tiers: Tiers) -> bool:
    """Say whether the model itself turns the first of the tiers, as under `longrope.apply`."""
    return bool(loaded_tier(rope_settings(model), tiers))


def _attend(query: Any, key: Any, value: Tensor, **options: Any) -> Tensor:
    """Turn what was postponed, and attend."""
    if isinstance(query, Unturned):
        if isinstance(key, Unturned):
            query, key = query.rotation.turned(query, key)
        else:  # of a layer that stays as loaded
            query = query.turned_by_model()
    return plain_attention.attend(query, key, value, **options)
