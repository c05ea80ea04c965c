"""Rotating queries and keys inside a Hugging Face model, with one rounding at the end.

A model file of transformers computes `cos` and `sin` once in its rotary module, casts them to the
dtype of the model, and each attention layer calls the file's own `apply_rotary_pos_emb`. In bf16
that rounds cos, sin and both products. Here the rotary module hands the layers a rotation
instead, and the file's function is wrapped once so that it recognises one; for any other argument
it is the original function, so a model that is not patched computes what it always did.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import torch
from torch import Tensor, nn


class CosSin(NamedTuple):
    """A rotation by tables: `[B or 1, N, R/2]`, float32 (float64 for a float64 model).

    A tuple of tensors, so that whatever moves or checkpoints a model's arguments knows it.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the first `R` channels of q `[B, H, N, D]` and k `[B, Hk, N, D]`, halves paired."""
        return self._turn(q), self._turn(k)

    def _turn(self, x: Tensor) -> Tensor:
        cos, sin = self.cos[:, None], self.sin[:, None]
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)

    def unsqueeze(self, dim: int):
        """Say what is wrong: only a function that took the place of ours comes here."""
        raise RuntimeError(
            "apply_rotary_pos_emb of the model's file was replaced after longrope.apply: "
            "apply such patches first and longrope.apply last"
        )


def accept_rotations(attention: nn.Module) -> None:
    """Make the model file of an attention layer understand a rotation, once per process.

    Raises `ValueError` where the file has no `apply_rotary_pos_emb` to wrap.
    """
    file = sys.modules[type(attention).__module__]
    original = getattr(file, "apply_rotary_pos_emb", None)
    if original is None:
        raise ValueError(
            f"model: expected attention layers whose file defines apply_rotary_pos_emb, "
            f"got {type(attention).__name__} of {file.__name__}"
        )
    if getattr(original, "accepts_rotations", False):
        return

    @functools.wraps(original)
    def apply_rotary_pos_emb(q, k, cos, sin, *args, **kwargs):
        if isinstance(cos, CosSin):
            return cos.rotate(q, k)
        return original(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.accepts_rotations = True
    file.apply_rotary_pos_emb = apply_rotary_pos_emb
