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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head_dim", [40, 13])
def test_merged_parts_are_the_whole(backend, dtype, head_dim):
    out_a, out_b = torch.randn(2, 2, 3, 11, head_dim, dtype=dtype)
    out_b = out_b.transpose(1, 2).contiguous().transpose(1, 2)
    lse_a, lse_b = 4 * torch.randn(2, 2, 3, 11)
    lse_a[0, 0, :4] = -torch.inf
    lse_b[0, 0, 2:6] = -torch.inf
    out_a[0, 0, :4] = out_b[0, 0, 2:6] = torch.nan  # no part in the result
    lse_a[1, 2, 3] = lse_b[1, 2, 3] = torch.inf
    arguments = out_a, lse_a, out_b, lse_b
    exact = ops.reference.merge_attention(*(t.double() for t in arguments))
    low = ops.reference.merge_attention(*arguments)
    got = ops.merge_attention(*arguments)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)
