"""Kernels: torch tensors in, torch tensors out (see the module of each op)."""

from longrope.ops import reference
from longrope.ops.attention import attention, merge_attention
from longrope.ops.rope import Rotation, rerotate, rope, rope_

__all__ = [
    "Rotation",
    "attention",
    "merge_attention",
    "reference",
    "rerotate",
    "rope",
    "rope_",
]
