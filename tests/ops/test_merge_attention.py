"""ops.merge_attention: parts of the keys, attended apart, are the whole."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.criterion import assert_as_accurate

from longrope import ops


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
    got = ops.merge_attention(*(t.to(backend.device) for t in arguments))
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)


def attend_by_parts(q, k, v, cuts, order):
    """Attend each part of the keys alone and merge them in the given order."""
    keys, queries = k.shape[2], q.shape[2]
    edges = [0, *sorted(cuts), keys]
    parts = [
        ops.attention(
            q, k[:, :, a:b], v[:, :, a:b], query_start=keys - queries - a, return_lse=True
        )
        for a, b in itertools.pairwise(edges)
    ]
    merged = parts[order[0] % len(parts)]
    for i in (n % len(parts) for n in order[1:]):
        merged = ops.merge_attention(*merged, *parts[i])
    return merged


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 30), st.integers(1, 30), st.lists(st.integers(0, 30), max_size=3),
    st.randoms(use_true_random=False),
)  # fmt: skip
def test_any_split_in_any_order_is_the_whole_with_its_gradients(queries, keys, cuts, random):
    """Also empty parts and queries that see no key."""
    cuts = [min(c, keys) for c in cuts]
    leaves = [
        torch.randn(1, h, n, 6, dtype=torch.float64, requires_grad=True)
        for h, n in ((2, queries), (1, keys), (1, keys))
    ]
    order = list(range(len(cuts) + 1))
    random.shuffle(order)
    results = []
    for out, lse in (
        ops.attention(*leaves, return_lse=True), attend_by_parts(*leaves, cuts, order),
    ):  # fmt: skip
        seen = lse.masked_fill(lse == -math.inf, 0)
        loss = out.pow(3).sum() + seen.square().sum()
        results.append((out, lse, *torch.autograd.grad(loss, leaves)))
    torch.testing.assert_close(results[1], results[0])


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 20), st.integers(1, 70), st.integers(1, 40), st.integers(0, 2**31))
def test_without_a_mask_the_order_of_the_keys_does_not_matter(queries, keys, head_dim, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (
        torch.randn(1, 2, n, head_dim, dtype=torch.float64, generator=generator)
        for n in (queries, keys, keys)
    )
    order = torch.randperm(keys, generator=generator)
    expected = ops.attention(q, k, v, causal=False, return_lse=True)
    got = ops.attention(q, k[:, :, order], v[:, :, order], causal=False, return_lse=True)
    torch.testing.assert_close(got, expected)


def test_gradcheck():
    """Derivatives against differences in float64, for all four arguments."""
    outs = [torch.randn(1, 2, 3, 4, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    lses = [torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True) for _ in "ab"]
    assert torch.autograd.gradcheck(ops.merge_attention, (outs[0], lses[0], outs[1], lses[1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    outs = [torch.randn(1, 2, 3, 4).to(dtype).requires_grad_() for _ in "ab"]
    lses = [torch.randn(1, 2, 3) for _ in "ab"]
    op = torch.ops.longrope.merge_attention
    torch.library.opcheck(op, (outs[0], lses[0], outs[1], lses[1]))


def test_wrong_inputs():
    """Each gets one sentence that names the argument, what was expected and what came."""
    out, lse = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3)
    for arguments, message in (
        ((out[0], lse, out, lse), r"out_a: expected"),
        ((out.int(), lse, out.int(), lse), r"out_a: expected float32"),
        ((out, lse, out.bfloat16(), lse), r"out_b: expected"),
        ((out, lse, out[:, :1], lse), r"out_b: expected"),
        ((out, lse[:, :, :2], out, lse), r"lse_a: expected"),
        ((out, lse, out, lse.double()), r"lse_b: expected"),
        ((out.mT, lse, out.mT, lse), r"expected"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.merge_attention(*arguments)
