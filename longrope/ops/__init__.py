"""Kernels: torch tensors in, torch tensors out (see the module of each op).

`ops.reference` needs no compiled extension. Without one the kernels' names raise, when they are
used, the ImportError that says how to build it.
"""

from longrope.ops import reference
from longrope.ops._rotation import Rotation

try:
    from longrope.ops.attention import attention, merge_attention
    from longrope.ops.perplexity import candidate_sums, linear_nll
    from longrope.ops.rope import rerotate, rerotate_rows_, rope, rope_
except ImportError as error:
    _no_kernels = str(error)

    def __getattr__(name: str):
        if name in __all__:
            raise ImportError(_no_kernels)
        raise AttributeError(f"module 'longrope.ops' has no attribute {name!r}")


__all__ = [
    "Rotation",
    "attention",
    "candidate_sums",
    "linear_nll",
    "merge_attention",
    "reference",
    "rerotate",
    "rerotate_rows_",
    "rope",
    "rope_",
]
