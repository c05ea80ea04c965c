"""Kernels: torch tensors in, torch tensors out (see the module of each op)."""

from longrope.ops import reference
from longrope.ops.attention import attention, merge_attention
from longrope.ops.perplexity import linear_nll, population_nll
from longrope.ops.rope import Rotation, rerotate, rope, rope_

__all__ = [
    "Rotation",
    "attention",
    "linear_nll",
    "merge_attention",
    "population_nll",
    "reference",
    "rerotate",
    "rope",
    "rope_",
]
