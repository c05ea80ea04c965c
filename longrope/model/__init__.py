"""`LongRoPEModel`: a causal transformer on longrope's kernels, from its first weights to 2M tokens.

`standalone` is the model, `blocks` its forward pass, `training` its `fit`, `extension` what finds
its tiers.
"""

from longrope.model.standalone import LongRoPEModel

__all__ = ["LongRoPEModel"]
