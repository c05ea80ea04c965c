"""Attention under tiers by position inside `torch.compile`: one opaque op for each layer.

Which tokens cross into which tier is known on the host alone, so nothing about it may be decided
while a graph is traced. The op makes the plan of its layer's pass when it runs; the graph never
changes, and is not compiled again at a crossing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from longrope.patching import tier_attention
from longrope.patching.tier_cache import Cached
from longrope.patching.tier_pass import Call, existing_keys, make_plan
from longrope.patching.tier_rotation import TieredRotation, Unturned
from longrope.patching.tiered import module_of
from longrope.patching.torch_attention import Options


class _Held(NamedTuple):
    """A layer's cache as the op gets it."""

    form: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    is_quantized: bool = False

    def storage(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.keys, self.values, self.positions


def attend(
    query: Unturned, key: Unturned | Cached, value: Tensor, mask: Tensor | None, options: Options,
    index: int,
) -> Tensor:  # fmt: skip
    """Return the attention of a pass, `[B, H, N, D]`, as `tier_attention.attend` does.

    `mask` is what the model's own implementation is given.
    """
    rotation = query.rotation
    told = (rotation.cos, rotation.sin, rotation.positions, mask, rotation.ticket)
    asked = (index, options.scale, options.window, options.softcap)
    if not isinstance(key, Cached):
        return torch.ops.longrope.attend_tiers(query.states, key.states, value, *told, *asked)
    keys, values, positions = key.layer.storage()
    return torch.ops.longrope.attend_tiers_cached(
        query.states, key.new.states, value, *told, key.layer.form, keys, values, positions,
        key.start, *asked,
    )  # fmt: skip


@torch.library.custom_op("longrope::attend_tiers", mutates_args=())
def _attend_tiers(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    mask: Tensor | None, ticket: int, index: int, scale: float | None, window: int | None,
    softcap: float | None,
) -> Tensor:  # fmt: skip
    query, key = _planned(q, k, cos, sin, positions, mask, ticket, 0)
    return tier_attention.attend(
        query, key, v, module_of(ticket), Options(scale, window, softcap), index
    )


@torch.library.custom_op(
    "longrope::attend_tiers_cached", mutates_args=("form", "keys", "values", "held_positions")
)
def _attend_tiers_cached(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    mask: Tensor | None, ticket: int, form: Tensor, keys: Tensor, values: Tensor,
    held_positions: Tensor, start: Tensor, index: int, scale: float | None,
    window: int | None, softcap: float | None,
) -> Tensor:  # fmt: skip
    begin = int(start)
    query, key = _planned(q, k, cos, sin, positions, mask, ticket, begin)
    cached = Cached(_Held(form, keys, values, held_positions), key, begin)
    options = Options(scale, window, softcap)
    with torch.no_grad():
        return tier_attention.attend(query, cached, v, module_of(ticket), options, index)


@_attend_tiers.register_fake
def _(q, *_):
    return torch.empty_like(q)


@_attend_tiers_cached.register_fake
def _(q, *_):
    return torch.empty_like(q)


def _keep(ctx, inputs, output):
    *tensors, ctx.ticket, ctx.index, ctx.scale, ctx.window, ctx.softcap = inputs
    ctx.save_for_backward(*tensors)


@contextlib.contextmanager
def _recording() -> Iterator[None]:
    """Record operations for a gradient inside an op, which torch runs with recording off."""
    kept = torch._C._dispatch_tls_local_include_set()
    hidden = torch._C._dispatch_tls_local_exclude_set()
    hidden = hidden.remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(kept, hidden), torch.enable_grad():
        yield


@torch.library.custom_op("longrope::attend_tiers_backward", mutates_args=())
def _attend_tiers_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor,
    mask: Tensor | None, ticket: int, index: int, scale: float | None, window: int | None,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Compute the attention again, as functions, and differentiate that."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    with _recording():
        query, key = _planned(*leaves[:2], cos, sin, positions, mask, ticket, 0)
        options = Options(scale, window, softcap)
        out = tier_attention.attend(query, key, leaves[2], module_of(ticket), options, index)
        grads = torch.autograd.grad(out, leaves, grad)
    return tuple(map(torch.Tensor.contiguous, grads))


@_attend_tiers_backward.register_fake
def _(grad, q, k, v, *_):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def _backward(ctx, grad):
    asked = (ctx.ticket, ctx.index, ctx.scale, ctx.window, ctx.softcap)
    grads = torch.ops.longrope.attend_tiers_backward(grad, *ctx.saved_tensors, *asked)
    return *grads, *[None] * 9


_attend_tiers.register_autograd(_backward, setup_context=_keep)


def _planned(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, mask: Tensor | None,
    ticket: int, start: int,
) -> tuple[Unturned, Unturned]:  # fmt: skip
    """Return queries and keys with the plan of their pass, which `start` tokens precede."""
    rotary = module_of(ticket)
    count = q.shape[2]
    exists = existing_keys(mask, start, count)
    if exists is not None and bool(exists.all()):
        exists = None
    call = Call(len(q), count, start, positions, None, None, exists, False, None, q.device)
    plan = make_plan(call, rotary.limits)
    settings = None if plan.tier is None else rotary.settings(plan.tier)
    first = rotary.tiers.limits[0]
    rotation = TieredRotation(cos, sin, positions, None, plan, settings, ticket, first)
    return Unturned(q, rotation, rotary.turn), Unturned(k, rotation, rotary.turn)
