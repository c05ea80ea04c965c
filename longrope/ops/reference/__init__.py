"""Plain PyTorch, same signatures: the executable specification of `longrope.ops`."""

from longrope.ops.reference.rope import rerotate, rope, rope_

__all__ = ["rerotate", "rope", "rope_"]
