"""Plain PyTorch, same signatures: the executable specification of `longrope.ops`."""

from longrope.ops.reference.attention import attention, merge_attention
from longrope.ops.reference.perplexity import candidate_sums, linear_nll
from longrope.ops.reference.rope import rerotate, rerotate_rows_, rope, rope_

__all__ = [
    "attention",
    "candidate_sums",
    "linear_nll",
    "merge_attention",
    "rerotate",
    "rerotate_rows_",
    "rope",
    "rope_",
]
