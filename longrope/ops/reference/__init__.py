"""Plain PyTorch, same signatures: the executable specification of `longrope.ops`."""

from longrope.ops.reference.attention import attention, merge_attention
from longrope.ops.reference.perplexity import linear_nll, population_nll
from longrope.ops.reference.rope import rerotate, rope, rope_

__all__ = [
    "attention",
    "linear_nll",
    "merge_attention",
    "population_nll",
    "rerotate",
    "rope",
    "rope_",
]
