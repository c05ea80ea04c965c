"""Queries and keys before their rotation under tiers, on their way to the attention function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longrope.patching.tier_pass import Plan


class TieredRotation(NamedTuple):
    """What the rotary module hands the layers: what the model turns by, and the plan of the pass.

    `cos` and `sin` are the model's own, `[B or 1, N, R]`; `positions` int64 `[B, N]` are those it
    turns by, `shift` int64 `[B]` the padding that they count; `settings` are
    those of the tier that all tokens share, where they do; `ticket` names the rotary module,
    `first_limit` is the end of its first tier. Without a plan, the pass is compiled.
    """

    cos: Tensor
    sin: Tensor
    positions: Tensor
    shift: Tensor | None
    plan: Plan | None
    settings: tuple | None
    ticket: int
    first_limit: int

    def postpone(self, q: Tensor, k: Tensor, original: Callable) -> tuple[Unturned, Unturned]:
        """Let the attention function turn queries and keys, which knows what is in the cache."""
        turn = turning_by(original)
        return Unturned(q, self, turn), Unturned(k, self, turn)


def turning_by(original: Callable) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """Return the rotation of a model's file, `apply_rotary_pos_emb`, of one tensor."""

    def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return original(x, x[:, :0], cos, sin)[0].to(x.dtype)  # autocast has tables in float32

    return turn


class Unturned(NamedTuple):
    """Queries or keys before their rotation, on their way to the attention function."""

    states: Tensor
    rotation: TieredRotation
    turn: Callable[[Tensor, Tensor, Tensor], Tensor]  # the model's own: states, cos, sin

    @property
    def device(self) -> torch.device:
        return self.states.device

    def __mul__(self, scale: Any) -> Unturned:  # queries that are scaled by their position
        return self._replace(states=self.states * scale)

    def turned_by_model(self) -> Tensor:
        """Return the states turned as the model does."""
        return self.turn(self.states, self.rotation.cos, self.rotation.sin)

    def unsqueeze(self, dim: int) -> None:
        """Say what is wrong: only a function that took the place of ours goes on like this."""
        raise RuntimeError(
            "attention of the model's file was replaced after longrope.apply: apply such patches "
            "first and longrope.apply last"
        )
