"""Numbers that no state dict holds, through everything that moves or empties a model."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class KeepsNumbers(nn.Module):
    """A rotary module whose numbers, and those of the module it replaces, are never lost.

    They follow from the factors and from the configuration, so they are in no state dict, and
    nothing brings them back after `to_empty`, or when a model made on the meta device gets its
    weights: a rotary embedding of transformers then turns by whatever lay in the memory.

    Attributes
    ----------
    original
        The module that this one replaces: a rotary embedding of transformers, made of `config`.
    """

    original: nn.Module

    def numbers(self) -> dict[str, Tensor]:
        """Return this module's buffers by name, on the CPU, as its factors give them."""
        raise NotImplementedError

    def put_numbers(self) -> None:
        """Register what `numbers` returns as buffers, which the state dict leaves out."""
        for name, values in self.numbers().items():
            self.register_buffer(name, values, persistent=False)

    def place(self, device: torch.device) -> None:
        """Move to a device; from the meta device, where values are unknown, too."""
        if device.type == "meta":
            return  # of an offloaded model: computed on the CPU, and moved when asked for
        if any(buffer.is_meta for buffer in self.buffers()):
            self.to_empty(device=device)
        else:
            self.to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeepsNumbers:
        """Do what `to`, `half`, `to_empty` and so on ask for, and compute again what that loses.

        After a change of dtype as well: a model that was in 16 bits has float32 angles again.
        """
        lost = _loses_values(fn) or any(buffer.is_meta for buffer in self.buffers())
        dtypes = [buffer.dtype for buffer in self.buffers()]
        super()._apply(fn, recurse)
        if lost or dtypes != [buffer.dtype for buffer in self.buffers()]:
            for name, values in self.numbers().items():
                setattr(self, name, values.to(getattr(self, name).device))
            _recompute(self.original)
        return self


def _loses_values(fn: Callable[[Tensor], Tensor]) -> bool:
    """Say whether a function of tensors forgets what is in them, as `to_empty` does."""
    probe = torch.frombuffer(bytearray(os.urandom(32)), dtype=torch.uint8)
    result = fn(probe)
    return result.is_meta or not torch.equal(result.cpu(), probe)


def _recompute(original: nn.Module) -> None:
    """Give a rotary embedding of transformers the numbers of a new one, where and as its own are.

    Numbers and tensors that are plain attributes too: how far a "dynamic" one has grown.
    """
    with torch.device("cpu"):
        new = type(original)(original.config)
    for name, values in new.named_buffers():
        old = original.get_buffer(name)
        setattr(original, name, values.to(old.device, old.dtype))
    for name, value in vars(new).items():
        if isinstance(value, Tensor):
            like: Any = next(original.buffers())
            setattr(original, name, value.to(like.device, like.dtype))
        elif isinstance(value, (int, float)) and name != "training":
            setattr(original, name, value)
