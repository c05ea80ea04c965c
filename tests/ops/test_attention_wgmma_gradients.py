"""Gradients of ops.attention by the kernels of compute capability 9.0: other bodies, and edges.

Blocks take 128 keys and tiles of 64 queries of one head, or 192 or 128 queries and tiles of 64
keys, through rings of four.
"""

from __future__ import annotations

import math

import pytest
import torch
from ops import test_attention as plain
from ops import test_attention_tiles as tiles
from support import backends
from torch.utils._pytree import tree_map

from longrope import ops

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=backends.wgmma_names())
def backend(request):
    """Attend and differentiate by those kernels wherever they can."""
    with backends.use(request.param) as used:
        yield used


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", plain.CASES)
def test_what_queries_see(backend, case, dtype):
    shape, arguments = plain.CASES[case]
    tiles.assert_accurate(backend, plain.inputs(shape, 40, dtype), **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 13, 64, 80, 96, 112, 128, 200])
def test_head_dims(backend, head_dim, dtype):
    """Two classes, and one that goes to other kernels; columns behind head_dim are zeros."""
    tiles.assert_accurate(backend, tiles.inputs(2, 1, 70, 150, head_dim, dtype))


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_rings_wrap_around(backend, head_dim, causal):
    """More tiles than a ring holds, twice, of both heads that share keys."""
    tensors = tiles.inputs(2, 1, 330, 600, head_dim, torch.bfloat16)
    tiles.assert_accurate(backend, tensors, causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_windows_leave_tiles_out_at_both_ends(backend, head_dim, softcap):
    arguments = {"window": 150, "key_start": 37, "query_range": (10, 390), "query_start": 100}
    tensors = tiles.inputs(1, 1, 400, 500, head_dim, torch.bfloat16)
    tiles.assert_accurate(backend, tensors, **arguments, softcap=softcap)


@pytest.mark.parametrize("window", [None, 33])
def test_every_offset_of_a_bound_in_a_tile(backend, window):
    arguments = {"query_start": torch.arange(0, 140, 3), "window": window}
    tensors = tiles.inputs(1, 1, 3, 145, 16, torch.bfloat16, batch=47)
    tiles.assert_accurate(backend, tensors, **arguments)


def test_every_offset_of_a_range_of_queries_in_a_tile(backend):
    begin = torch.arange(0, 140, 5)
    arguments = {"query_range": (begin, begin + 33), "window": 40}
    tensors = tiles.inputs(1, 1, 170, 170, 16, torch.bfloat16, batch=len(begin))
    tiles.assert_accurate(backend, tensors, **arguments)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_what_is_not_seen_may_be_nan(backend, head_dim):
    """Of queries, keys, values and the gradient of the output; before and behind what is read."""
    batch, queries, keys = 6, 150, 300
    step = torch.arange(batch)
    arguments = {
        "query_start": 40 * step - 60,
        "window": 50,
        "key_start": 9 * step,
        "key_length": 290 - 21 * step,
        "query_range": (7 * step, queries - 11 * step),
    }
    q, k, v = tiles.inputs(2, 1, queries, keys, head_dim, torch.bfloat16, batch=batch)
    position = (40 * step - 60)[:, None] + torch.arange(queries)
    key = torch.arange(keys)
    seen = (key <= position[..., None]) & (key > position[..., None] - 50)
    seen &= (key >= 9 * step[:, None, None]) & (key < (290 - 21 * step)[:, None, None])
    begin, end = (x[:, None] for x in arguments["query_range"])
    attends = (torch.arange(queries) >= begin) & (torch.arange(queries) < end)
    seen &= attends[..., None]
    unseen_rows, unseen_keys = (~seen.any(d)[:, None, :, None] for d in (2, 1))
    grad = torch.randn(q.shape).to(q.dtype)

    def gradients(q, k, v, grad):
        leaves = [x.to(backend.device).requires_grad_() for x in (q, k, v)]
        there = tree_map(lambda a: a.to(backend.device) if torch.is_tensor(a) else a, arguments)
        out = ops.attention(*leaves, **there)
        return torch.autograd.grad(out, leaves, grad.to(backend.device))

    expected = gradients(q, k, v, grad.masked_fill(unseen_rows, 0))
    rows = [x.masked_fill(unseen_rows, math.nan) for x in (q, grad)]
    got = gradients(rows[0], *(x.masked_fill(unseen_keys, math.nan) for x in (k, v)), rows[1])
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("group", [3, 5])
def test_groups_that_are_no_power_of_two(backend, group):
    tensors = tiles.inputs(group, 1, 141, 170, 24, torch.bfloat16)
    tiles.assert_accurate(backend, tensors, window=30)


@pytest.mark.parametrize("scale", [0.0, -0.2])
def test_scales(backend, scale):
    tiles.assert_accurate(backend, tiles.inputs(1, 1, 70, 90, 24, torch.float16), scale=scale)


def test_a_gradient_that_is_one_element(backend):
    """A sum's: strides of 0, which tensor maps do not know."""
    leaves = [
        x.to(backend.device).requires_grad_() for x in tiles.inputs(2, 1, 70, 90, 64, DTYPES[0])
    ]
    got = torch.autograd.grad(ops.attention(*leaves).sum(), leaves)
    ones = torch.ones_like(leaves[0])
    expected = torch.autograd.grad(ops.attention(*leaves), leaves, ones)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
