"""Tiers by position inside a model: the rotary module, and the hooks that plan a pass."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longrope.factors import Tiers
from longrope.patching import tier_cache
from longrope.patching.embedding import bits, stacked
from longrope.patching.keeping import KeepsNumbers
from longrope.patching.rotation import accept_rotations, original_rotation
from longrope.patching.settings import LENGTH_DEPENDENT, RopeSettings, text_config
from longrope.patching.tier_pass import (
    POSITIONAL,
    PREFIX,
    Plan,
    arguments_of,
    cache_argument,
    make_plan,
    read_call,
)
from longrope.patching.tier_rotation import TieredRotation, turning_by

#: Rotary modules by ticket, for layers and caches, which hold none.
_TICKETS = itertools.count(1)
_MODULES: weakref.WeakValueDictionary[int, TieredRotaryEmbedding] = weakref.WeakValueDictionary()


class TieredRotaryEmbedding(KeepsNumbers):
    """A model's rotary embedding under tiers by position (`longrope.Tiers`).

    Parameters
    ----------
    original
        The rotary module that this one replaces; kept for `longrope.remove`, and for the first
        tier where that is the model as loaded.
    tiers
        The tiers.
    first_by_model
        Whether the first tier is the model as loaded, and turned by `original`.
    keeps_unrotated
        Whether the cache keeps keys un-rotated from the second tier on.
    """

    def __init__(
        self, original: nn.Module, tiers: Tiers, first_by_model: bool, keeps_unrotated: bool
    ):
        super().__init__()
        self.original = original
        self.tiers = tiers
        self.first_by_model = first_by_model
        self.keeps_unrotated = keeps_unrotated
        self.put_numbers()
        self.limits = torch.tensor(tiers.limits, device="cpu")  # where passes are planned
        self.hooks: tuple = ()
        # Of the tiers and of the design of the cache: what makes cached keys readable.
        said = repr(([tier.as_fields() for tier in tiers], keeps_unrotated))
        self.signature = hashlib.sha256(said.encode()).hexdigest()
        self._register()

    def numbers(self) -> dict[str, Tensor]:
        """Return the buffers by name, on the CPU."""
        inv_freq, factors = stacked(self.tiers)
        return {
            "inv_freq_bits": bits(inv_freq),
            "factor_bits": bits(factors),
            "base_bits": bits(self.tiers[0].base_inv_freq()),
        }

    def _register(self) -> None:
        """Take a ticket, by which `module_of` finds this module while it lives."""
        self.ticket = next(_TICKETS)
        _MODULES[self.ticket] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Become a copy, with a ticket of its own; maybe in a process that has applied nothing."""
        from longrope.patching.attention import register_again

        super().__setstate__(state)
        self._register()
        accept_rotations(self.original)
        register_again(self.original.config)

    @property
    def turn(self) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The rotation of the model's file: states, cosines, sines."""
        return turning_by(original_rotation(self.original))

    def extra_repr(self) -> str:
        """Name the positions at which tiers end, for `print(model)`."""
        ends = ", ".join(str(limit) for limit in self.tiers.limits)
        return f"tiers by position, up to {ends} tokens"

    def settings(self, tier: int) -> tuple[Tensor, int, Tensor, float | Tensor]:
        """Return what `ops.rope` turns by: frequencies, start tokens, the original ones, factor.

        Of all layers, as `KernelRotation` has them, where some tier differs between them.
        """
        factors = self.tiers[tier]
        frequencies = self.inv_freq_bits[tier].view(torch.float64)
        base = self.base_bits.view(torch.float64)
        if frequencies.ndim > 1:
            factor = self.factor_bits[tier].view(torch.float64)[:, None]
            return frequencies[:, None], factors.start_tokens, base, factor
        return frequencies, factors.start_tokens, base, factors.attention_factor

    def model_tables(self, like: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return the model's own cosines and sines `[B, n, R]` in the dtype of `like`."""
        return self.original(like, positions, *self._layer_type)

    @property
    def _layer_type(self) -> tuple[str, ...]:
        """What modules by layer type ask for beside positions: the kind that is extended."""
        return ("full_attention",) if hasattr(self.original, "layer_types") else ()

    def forward(
        self, x: Tensor, position_ids: Tensor, layer_type: str | None = None, **_: Any
    ) -> tuple[Any, Any]:
        """Return what the attention layers unpack as `cos, sin = position_embeddings`.

        The model's own tables in passes that are left to the model, and for layer types that stay
        as loaded.
        """
        kind = () if layer_type is None else (layer_type,)
        cos, sin = self.original(x, position_ids, *kind)
        stays = layer_type not in (None, "full_attention")
        plan, shift = (None, None) if torch.compiler.is_compiling() else passing(self)
        if stays or (plan is not None and plan.own):
            return cos, sin
        positions = position_ids.to(x.device).expand(x.shape[0], -1)
        settings = None if plan is None or plan.tier is None else self.settings(plan.tier)
        first = self.tiers.limits[0]
        rotation = TieredRotation(cos, sin, positions, shift, plan, settings, self.ticket, first)
        return rotation, None


def module_of(ticket: int) -> TieredRotaryEmbedding:
    """Return the rotary module of a ticket."""
    return _MODULES[ticket]


#: Of each thread: the plan and the padding of the pass that a module is in, by its ticket.
_THREAD = threading.local()


def _passes() -> dict[int, tuple[Plan, Tensor | None]]:
    if not hasattr(_THREAD, "passes"):
        _THREAD.passes = {}
    return _THREAD.passes


def passing(rotary: TieredRotaryEmbedding) -> tuple[Plan | None, Tensor | None]:
    """Return the plan and the padding of the pass that a module is in; None outside of one."""
    return _passes().get(rotary.ticket, (None, None))


def install(base: nn.Module, rotary: TieredRotaryEmbedding) -> None:
    """Make `base`, a decoder, plan each pass before it runs."""
    rotary.hooks = (
        base.register_forward_pre_hook(_before, with_kwargs=True),
        base.register_forward_hook(_after, with_kwargs=True, always_call=True),
    )


def loaded_tier(settings: RopeSettings, tiers: Tiers) -> bool:
    """Say whether the first of the tiers is the model as loaded, and its angles fixed ones."""
    first, loaded = tiers[0], settings.loaded
    return (
        loaded is not None
        and settings.rope_type not in LENGTH_DEPENDENT
        and first.start_tokens == loaded.start_tokens
        and np.allclose(first.inv_freq(), loaded.inv_freq(), rtol=1e-5, atol=0)
        and np.allclose(first.attention_factor, loaded.attention_factor, rtol=1e-6)
    )


def _before(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Plan a pass, and make its cache one whose keys can follow."""
    if not isinstance(base.rotary_emb, TieredRotaryEmbedding):
        return None
    if torch.compiler.is_compiling():
        if not _breaks_graph(base, args, kwargs):
            return None
        from longrope.patching import tier_outside  # which imports the compiler

        return tier_outside.plan_pass(base, args, kwargs)
    return plan_pass(base, args, kwargs)


def _breaks_graph(base: nn.Module, args: tuple, kwargs: dict) -> bool:
    """Say whether a compiled pass is planned, and attends, outside its graphs: by its cache.

    Only a pass without one, or with one of fixed size that a pass has prepared, is a single graph.
    """
    given = arguments_of(args, kwargs)
    cache = given.get("cache")
    if cache is None:
        return _will_cache(base, given)
    return not tier_cache.is_ready(cache, base.rotary_emb)


def plan_pass(base: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
    """Do what `_before` does; returns the arguments where they change."""
    rotary = base.rotary_emb
    if not (base.config._attn_implementation or "").startswith(PREFIX):
        from longrope.patching.attention import use_tiered_attention

        use_tiered_attention(base)  # set_attn_implementation has chosen another one since
    call = read_call(args, kwargs)
    changed = None
    cache = call.cache
    if cache is None and _will_cache(base, arguments_of(args, kwargs)):
        cache = tier_cache.new_cache(base)
        call = call._replace(cache=cache)
        more = dict(zip(POSITIONAL[3:], args[3:], strict=False)) | {"cache": cache}
        more[cache_argument(base)] = more.pop("cache")
        changed = (args[:3], kwargs | more)
    elif cache is not None:
        tier_cache.adopt(cache, base)
    plan = make_plan(call, rotary.limits)
    if plan.tier == 0 and rotary.first_by_model and not getattr(cache, "is_compileable", False):
        layers = tier_cache.tiered_layers(cache)
        if all(layer.form is None or not layer.form.any() for layer in layers):
            plan = dataclasses.replace(plan, own=True)
            for layer in layers:
                layer.incoming = call.positions
    _passes()[rotary.ticket] = (plan, call.shift)
    return changed


def _after(base: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
    """Forget the plan; layers that run again have it in their arguments."""
    if not isinstance(base.rotary_emb, TieredRotaryEmbedding):
        return
    if not torch.compiler.is_compiling():
        forget_pass(base, args, kwargs)
    elif _breaks_graph(base, args, kwargs):
        from longrope.patching import tier_outside

        tier_outside.forget_pass(base, args, kwargs)


def forget_pass(base: nn.Module, args: tuple, kwargs: dict) -> None:
    """Do what `_after` does."""
    rotary = base.rotary_emb
    plan, _ = _passes().pop(rotary.ticket, (None, None))
    if plan is not None and not plan.own:
        return
    for layer in tier_cache.tiered_layers(arguments_of(args, kwargs).get("cache")):
        layer.incoming = None


def _will_cache(base: nn.Module, given: dict[str, Any]) -> bool:
    """Say whether the decoder will make a cache of its own."""
    use_cache = given.get("use_cache")
    if use_cache is None:
        use_cache = getattr(text_config(base), "use_cache", False)
    recomputes = base.training and getattr(base, "gradient_checkpointing", False)
    return bool(use_cache) and not recomputes
