"""Tensors that move to another device as the views they are."""

from __future__ import annotations

import torch


def moved(tensor: torch.Tensor, device: str | torch.device) -> torch.Tensor:
    """Return `tensor` on a device with its strides, its offset and what it shares with itself.

    `tensor.to(device)` makes what is expanded dense, and lets a slice begin at an aligned address.
    """
    whole = torch.empty(0, dtype=tensor.dtype).set_(tensor.untyped_storage()).to(device)
    return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
