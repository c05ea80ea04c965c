"""Rotating queries and keys inside a Hugging Face model, with one rounding at the end.

A model file of transformers computes `cos` and `sin` once in its rotary module, casts them to the
dtype of the model, and each attention layer calls the file's own `apply_rotary_pos_emb`. In bf16
that rounds cos, sin and both products. Here the rotary module hands the layers a rotation
instead, and the file's function is wrapped once so that it recognises one; for any other argument
it is the original function, so a model that is not patched computes what it always did.

A rotation is a tuple of tensors, so that whatever moves, checkpoints or compiles a model's
arguments knows how to treat it.
"""

from __future__ import annotations

import functools
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longrope import ops


def _has_kernels(device_type: str) -> bool:
    key = device_type.upper()
    return torch._C._dispatch_has_kernel_for_dispatch_key("longrope::rope", key)


#: Device types whose kernels this build of the extension holds.
DEVICES_WITH_KERNELS = tuple(kind for kind in ("cpu", "cuda") if _has_kernels(kind))


def _refuse(rotation, dim: int):
    """Say what is wrong: only a function that took the place of ours asks for `cos.unsqueeze`."""
    raise RuntimeError(
        "apply_rotary_pos_emb of the model's file was replaced after longrope.apply: "
        "apply such patches first and longrope.apply last"
    )


class KernelRotation(NamedTuple):
    """A rotation by `ops.rope`; the fields are its arguments.

    Or that of all layers, of which `of_layer` picks one: `inv_freq` is `[L, B or 1, G, R/2]` then,
    and `attention_factor` `[L, B or 1, G]`.
    """

    positions: Tensor
    inv_freq: Tensor
    start_tokens: int | Tensor
    base_inv_freq: Tensor
    attention_factor: float | Tensor

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the first `R` channels of q `[B, H, N, D]` and k `[B, Hk, N, D]`, halves paired."""
        return ops.rope(q, k, *self)

    def of_layer(self, layer: int) -> KernelRotation:
        """Return the rotation of one layer."""
        if self.inv_freq.dim() < 4:
            return self
        inv_freq, factor = self.inv_freq[layer], self.attention_factor[layer]
        if inv_freq.shape[1] == 1:  # heads that turn alike
            inv_freq, factor = inv_freq[:, 0], factor[:, 0]
            if len(inv_freq) == 1:
                inv_freq, factor = inv_freq[0], factor[0]
        return self._replace(inv_freq=inv_freq, attention_factor=factor)

    unsqueeze = _refuse


class TableRotation(NamedTuple):
    """A rotation by tables `[B or 1, N, R/2]`, for devices whose kernels are not built.

    float32, or float64 for a float64 model. By groups of heads `[B or 1, G, N, R/2]`, of all layers
    `[L, B or 1, G, N, R/2]`.
    """

    cos: Tensor
    sin: Tensor

    def rotate(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Turn the first `R` channels of q `[B, H, N, D]` and k `[B, Hk, N, D]`, halves paired."""
        return self._turn(q), self._turn(k)

    def of_layer(self, layer: int) -> TableRotation:
        """Return the rotation of one layer."""
        return TableRotation(self.cos[layer], self.sin[layer]) if self.cos.dim() > 4 else self

    def _turn(self, x: Tensor) -> Tensor:
        if self.cos.dim() == 3:
            cos, sin = self.cos[:, None], self.sin[:, None]
        else:
            each = x.shape[1] // self.cos.shape[1]
            cos, sin = (t.repeat_interleave(each, 1) for t in self)
        half = cos.shape[-1]
        first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        turned = (first * cos - second * sin, second * cos + first * sin)
        return torch.cat([*(part.to(x.dtype) for part in turned), rest], dim=-1)

    unsqueeze = _refuse


def tabulate(arguments: KernelRotation, dtype: torch.dtype) -> TableRotation:
    """Compute the tables of a rotation, in `dtype`.

    The angles are float64 products: off by at most 5e-10 rad at position 2^21, where float32 is
    off by 0.16 rad.
    """
    positions, inv_freq, start_tokens, base, factor = arguments
    device = positions.device

    def by_row(value: float | Tensor, dtype: torch.dtype) -> Tensor:
        return torch.as_tensor(value, dtype=dtype, device=device).reshape(-1, 1, 1)

    positions = positions.reshape(-1, positions.shape[-1], 1)
    start_tokens = by_row(start_tokens, torch.int64)
    early = (positions < start_tokens) & (start_tokens > 0)  # as ops.rope has it
    if inv_freq.dim() > 2:  # by groups of heads, maybe of all layers
        positions, early = positions[:, None], early[:, None]
        inv_freq = inv_freq[..., None, :]
        factor = torch.as_tensor(factor, dtype=torch.float64, device=device)
        factor = factor[..., None, None] if factor.dim() else factor
    else:
        inv_freq = inv_freq.reshape(-1, 1, inv_freq.shape[-1])
        factor = by_row(factor, torch.float64)
    angle = positions * torch.where(early, base, inv_freq)
    return TableRotation((angle.cos() * factor).to(dtype), (angle.sin() * factor).to(dtype))


def original_rotation(part: nn.Module) -> Any:
    """Return the `apply_rotary_pos_emb` of the file that defines a model's part, unwrapped."""
    found = sys.modules[type(part).__module__].apply_rotary_pos_emb
    return found.__wrapped__ if getattr(found, "accepts_rotations", False) else found


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
        if isinstance(cos, (KernelRotation, TableRotation)):
            return cos.rotate(q, k)
        if hasattr(cos, "postpone"):
            return cos.postpone(q, k, original)
        return original(q, k, cos, sin, *args, **kwargs)

    apply_rotary_pos_emb.accepts_rotations = True
    file.apply_rotary_pos_emb = apply_rotary_pos_emb
