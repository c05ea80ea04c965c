"""ops.attention against its specification."""

from __future__ import annotations

import pytest
import torch
from support.criterion import assert_as_accurate

from longrope import ops


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_causal_with_grouped_heads(isa, dtype):
    q, k, v = (torch.randn(2, h, n, 40, dtype=dtype) for h, n in ((4, 37), (2, 53), (2, 53)))
    exact = ops.reference.attention(q.double(), k.double(), v.double(), return_lse=True)
    low = ops.reference.attention(q, k, v, return_lse=True)
    got = ops.attention(q, k, v, return_lse=True)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)
