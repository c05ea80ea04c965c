"""Forward-mode derivatives of the ops (`torch.func.jvp`, `jacfwd`, `torch.autograd.forward_ad`).

`torch.library` takes formulas for the reverse mode alone, and an op without one for the forward
mode would drop tangents without a word: derivatives of zero. So the public functions look for
tangents first. A linear op turns them as it turns its input; the others refuse them.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.autograd.forward_ad import make_dual, unpack_dual

__all__ = ["linear_in", "push_forward", "refuse_tangents", "tangents"]


def tangents(*tensors: object) -> list[Tensor | None] | None:
    """Return the tangent of each argument, None where it has none; None where no argument has."""
    found = [unpack_dual(t).tangent if isinstance(t, Tensor) else None for t in tensors]
    return found if any(t is not None for t in found) else None


def refuse_tangents(op: str, **arguments: object) -> None:
    """Raise NotImplementedError where an argument has a tangent that `op` has no formula for."""
    for name, argument in arguments.items():
        if tangents(argument):
            raise NotImplementedError(
                f"{op}: expected no forward-mode tangents (torch.func.jvp, jacfwd), got one of "
                f"{name}; this op has derivatives in reverse mode (backward) or none"
            )


def push_forward(
    function: Callable[..., tuple[Tensor, ...]],
    rule: Callable[..., tuple[Tensor | None, ...]],
    *tensors: Tensor,
) -> tuple[Tensor, ...]:
    """Return `function(*tensors)`, its outputs with their tangents where the inputs have some.

    Parameters
    ----------
    function : callable
        Takes the tensors; a tuple.
    rule : callable
        Takes the tensors without tangents and the tangents (zeros where one is missing), and
        returns the tangent of each output, None for an output without one.
    """
    given = tangents(*tensors)
    if given is None:
        return function(*tensors)
    primals = [unpack_dual(t).primal for t in tensors]
    moves = [p.new_zeros(p.shape) if t is None else t for p, t in zip(primals, given, strict=True)]
    return tuple(
        out if tangent is None else make_dual(out, tangent)
        for out, tangent in zip(function(*primals), rule(primals, moves), strict=True)
    )


def linear_in(function: Callable[..., tuple[Tensor, ...]], *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return what a function that is linear in the tensors gives, tangents included."""
    return push_forward(function, lambda _, moves: function(*moves), *tensors)
