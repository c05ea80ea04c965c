"""Plain PyTorch, same signatures: the executable specification of `longrope.ops`."""

from longrope.ops.reference.attention import attention, merge_attention
from longrope.ops.reference.rope import rerotate, rope, rope_

__all__ = ["attention", "merge_attention", "rerotate", "rope", "rope_"]
