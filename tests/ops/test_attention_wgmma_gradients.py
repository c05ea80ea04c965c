"""Gradients of ops.attention by the kernels of compute capability 9.0: other bodies, and edges.

Blocks take 128 keys and tiles of 64 queries of one head, or 192 or 128 queries and tiles of 64
keys, through rings of four.
"""

from __future__ import annotations

import math

import pytest
import torch
from emulation.build import compiler
from ops import test_attention as plain
from ops import test_attention_tiles as tiles
from support import backends
from torch.utils._pytree import tree_map

from longrope import ops


@pytest.fixture(params=backends.wgmma_names())
def backend(request):
    """Attend and differentiate by those kernels wherever they can."""
    with backends.use(request.param) as used:
        yield used


@pytest.mark.parametrize("case", plain.CASES)
def test_what_queries_see(backend, case):
    shape, arguments = plain.CASES[case]
    tiles.assert_accurate(backend, plain.inputs(shape, 40, torch.bfloat16), **arguments)


@pytest.mark.parametrize("head_dim", [1, 13, 64, 80, 96, 112, 128, 200])
def test_head_dims(backend, head_dim):
    """Two classes, and one that goes to other kernels; columns behind head_dim are zeros."""
    tiles.assert_accurate(backend, tiles.inputs(2, 1, 70, 150, head_dim, torch.float16))


@pytest.mark.parametrize(("head_dim", "causal"), [(64, True), (128, False), (128, True)])
def test_rings_wrap_around(backend, head_dim, causal):
    """More tiles than a ring holds, twice, of both heads that share keys."""
    tensors = tiles.inputs(2, 1, 300, 560, head_dim, torch.bfloat16)
    tiles.assert_accurate(backend, tensors, causal=causal)


@pytest.mark.parametrize(("head_dim", "softcap"), [(64, None), (64, 2.0), (128, 2.0)])
def test_windows_leave_tiles_out_at_both_ends(backend, head_dim, softcap):
    arguments = {"window": 150, "key_start": 37, "query_range": (10, 390), "query_start": 100}
    tensors = tiles.inputs(1, 1, 400, 500, head_dim, torch.bfloat16)
    tiles.assert_accurate(backend, tensors, **arguments, softcap=softcap)


@pytest.mark.parametrize("window", [None, 33])
def test_every_offset_of_a_bound_in_a_tile(backend, window):
    arguments = {"query_start": torch.arange(0, 140, 5), "window": window}
    tensors = tiles.inputs(1, 1, 3, 145, 16, torch.bfloat16, batch=28)
    tiles.assert_accurate(backend, tensors, **arguments)


def test_every_offset_of_a_range_of_queries_in_a_tile(backend):
    begin = torch.arange(0, 140, 7)
    arguments = {"query_range": (begin, begin + 33), "window": 40}
    tensors = tiles.inputs(1, 1, 170, 170, 16, torch.bfloat16, batch=len(begin))
    tiles.assert_accurate(backend, tensors, **arguments)


@pytest.mark.parametrize("head_dim", [16, 128])
def test_what_is_not_seen_may_be_nan(backend, head_dim):
    """Of queries, keys, values and the gradient of the output; before and behind what is read."""
    batch, queries, keys = 4, 150, 300
    step = torch.arange(batch)
    arguments = {
        "query_start": 60 * step - 60,
        "window": 50,
        "key_start": 13 * step,
        "key_length": 290 - 31 * step,
        "query_range": (11 * step, queries - 17 * step),
    }
    q, k, v = tiles.inputs(2, 1, queries, keys, head_dim, torch.bfloat16, batch=batch)
    position = (60 * step - 60)[:, None] + torch.arange(queries)
    key = torch.arange(keys)
    seen = (key <= position[..., None]) & (key > position[..., None] - 50)
    seen &= (key >= 13 * step[:, None, None]) & (key < (290 - 31 * step)[:, None, None])
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
        x.to(backend.device).requires_grad_() for x in tiles.inputs(2, 1, 70, 90, 64, torch.float16)
    ]
    got = torch.autograd.grad(ops.attention(*leaves).sum(), leaves)
    ones = torch.ones_like(leaves[0])
    expected = torch.autograd.grad(ops.attention(*leaves), leaves, ones)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture
def kernel_of(monkeypatch):
    """Tell which kernels differentiate (queries, heads, head_dim), by a choice, on a device."""
    from emulation import attention, library

    monkeypatch.setattr(library.Runtime, "ORDERS", ("forward",))

    def kernel_of(choice, capability, queries, heads, head_dim, dtype=torch.bfloat16):
        q, k, v = tiles.inputs(heads, heads, queries, 9, head_dim, dtype)
        lse = torch.zeros(1, heads, queries)
        bounds = (0, None, 0, None, 9, None, 0, None, queries, None)
        with library.attention_kernel(choice, capability):
            attention.attention_backward(q, None, q, k, v, q, lse, False, *bounds, 0, 1.0, 0.0)
        return library.runtime().last_kernel()

    return kernel_of


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_what_decides_which_kernels_differentiate(kernel_of):
    """Capability, dtype, head_dim, a full tile of queries, and 66 blocks of 128 keys."""
    assert kernel_of("auto", 90, 64, 66, 8) == "attention_backward_sm90"
    assert kernel_of("auto", 90, 63, 66, 8) == "attention_backward"
    assert kernel_of("auto", 90, 64, 65, 8) == "attention_backward"
    for capability in (80, 86, 100, 120):
        assert kernel_of("wgmma", capability, 1, 1, 8) == "attention_backward"
    assert kernel_of("wgmma", 90, 1, 1, 128) == "attention_backward_sm90"
    assert kernel_of("wgmma", 90, 1, 1, 129) == "attention_backward"
    assert kernel_of("wgmma", 90, 1, 1, 8, torch.float32) == "attention_backward"
    assert kernel_of("mma", 90, 1, 1, 8) == "attention_backward"
