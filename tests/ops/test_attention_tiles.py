"""ops.attention where kernels cut their work: several tiles, parts of the keys, unaligned rows."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_as_accurate, gradient_floor
from support.views import moved
from torch.utils._pytree import tree_map

from longrope import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def results(function, tensors, device="cpu", **arguments):
    """Out, lse and the gradients of q, k and v of sums that weigh every element differently."""
    leaves = [t.detach().to(device).requires_grad_() for t in tensors]
    arguments = tree_map(lambda a: a.to(device) if torch.is_tensor(a) else a, arguments)
    out, lse = function(*leaves, **arguments, return_lse=True)
    seen = lse.isfinite()
    weights = torch.linspace(-1, 1, out.numel(), dtype=lse.dtype, device=device).view(out.shape)
    loss = (out.to(lse.dtype) * weights).sum() + (lse.masked_fill(~seen, 0) * weights[..., 0]).sum()
    loss.backward()
    return out.detach(), lse.detach(), *(t.grad for t in leaves)


def assert_accurate(backend, tensors, **arguments):
    exact = results(ops.reference.attention, [t.double() for t in tensors], **arguments)
    low = results(ops.reference.attention, tensors, **arguments)
    got = results(ops.attention, tensors, backend.device, **arguments)
    names = ("out", "lse", "gradient of q", "gradient of k", "gradient of v")
    for name, *three in zip(names, got, low, exact, strict=True):
        floor = gradient_floor(three[2], three[0].dtype, exact[1])
        assert_as_accurate(*three, floor=floor, name=name)
    # In float32 for every dtype: a key too many or too few among some hundreds shows.
    torch.testing.assert_close(got[1].cpu(), exact[1].float(), rtol=1e-4, atol=1e-4)


def inputs(heads, kv_heads, queries, keys, head_dim, dtype, batch=1):
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, head_dim).to(dtype) for h, n in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 96, 128, 200])
def test_several_tiles_of_rows_and_keys(backend, head_dim, dtype):
    """Rows of three heads in one tile; the last tiles are not full."""
    assert_accurate(backend, inputs(3, 1, 49, 141, head_dim, dtype))


@pytest.mark.parametrize(
    "arguments",
    [
        {"window": 20},
        {"window": 70, "causal": False},
        {"query_start": torch.tensor([-40, 90]), "key_length": torch.tensor([64, 129])},
        {"key_start": torch.tensor([65, 3]), "softcap": 2.0},
        {"scale": -0.2},
        {"query_range": (torch.tensor([0, 33]), torch.tensor([31, 80]))},
        {"query_range": (5, 70), "window": 20, "query_start": torch.tensor([-10, 80])},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiles_that_see_little(backend, arguments, dtype):
    """Tiles before, on and behind every bound."""
    assert_accurate(backend, inputs(2, 2, 80, 131, 24, dtype, batch=2), **arguments)


@pytest.mark.parametrize("window", [None, 33])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_offset_of_a_bound_in_a_tile(backend, dtype, window):
    arguments = {"query_start": torch.arange(70), "window": window}
    assert_accurate(backend, inputs(1, 1, 3, 75, 16, dtype, batch=70), **arguments)


def test_rows_of_a_block_that_begin_behind_its_first_keys(backend):
    """With a window, from the one key before to the one key behind the end of a tile of 64."""
    arguments = {"query_start": torch.arange(54, 59), "window": 40, "key_start": 50}
    assert_accurate(backend, inputs(1, 1, 128, 190, 16, torch.bfloat16, batch=5), **arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_offset_of_a_range_of_queries_in_a_tile(backend, dtype):
    begin = torch.arange(70)
    arguments = {"query_range": (begin, begin + 33), "window": 40}
    assert_accurate(backend, inputs(1, 1, 75, 75, 16, dtype, batch=70), **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_of_zero(backend, dtype):
    """The mean of the values seen."""
    assert_accurate(backend, inputs(1, 1, 20, 70, 24, dtype), scale=0.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_queries_on_a_long_cache(backend, dtype):
    """The keys are cut into parts; those beyond a row's length are empty."""
    arguments = {"query_start": 690, "key_length": torch.tensor([700, 30, 0])}
    assert_accurate(backend, inputs(4, 2, 2, 700, 64, dtype, batch=3), **arguments)
    arguments["query_range"] = (torch.tensor([1, 0, 0]), torch.tensor([2, 2, 1]))
    assert_accurate(backend, inputs(4, 2, 2, 700, 64, dtype, batch=3), **arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_unaligned_and_expanded_views(backend, dtype):
    """Rows that begin at any element, keys shared by the batch, gradients with gaps."""
    q = torch.randn(2, 4, 11, 47).to(dtype)[..., 3:43]
    k, v = torch.randn(2, 1, 2, 39, 53).to(dtype)[..., 1:41].expand(2, 2, 2, 39, 40)
    exact = ops.reference.attention(*(t.double() for t in (q, k, v)))
    low = ops.reference.attention(q, k, v)
    leaves = [moved(t, backend.device).requires_grad_() for t in (q, k, v)]
    out = ops.attention(*leaves)
    assert_as_accurate(out, low, exact)
    grad = moved(torch.randn(2, 4, 11, 45).to(dtype)[..., 5:], backend.device)
    got = torch.autograd.grad(out, leaves, grad)
    leaves = [t.detach().contiguous().requires_grad_() for t in leaves]
    expected = torch.autograd.grad(ops.attention(*leaves), leaves, grad.contiguous())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_positions_far_away(backend):
    """Beyond the range of 32 bits, and where sums would overflow 64."""
    tensors = inputs(1, 1, 5, 9, 16, torch.float32)
    there = [t.to(backend.device) for t in tensors]
    everything = ops.attention(*there, causal=False, return_lse=True)
    for start in (2**33, 2**61, 2**63 - 1):
        for got, expected in zip(
            ops.attention(*there, query_start=start, return_lse=True), everything, strict=True
        ):
            assert torch.equal(got, expected)
        for arguments in ({"query_start": -start}, {"query_start": start, "window": 100}):
            out, lse = ops.attention(*there, **arguments, return_lse=True)
            assert (out == 0).all() and (lse == -math.inf).all()


def test_bounds_of_rows_beyond_the_keys(backend):
    """On CUDA they are not checked, which would wait for the device; nor is memory outside read."""
    if not backend.is_cuda:
        pytest.skip("refused on the CPU")
    tensors = [t.to(backend.device) for t in inputs(2, 1, 3, 70, 16, torch.bfloat16, batch=2)]
    rows = {"key_start": torch.tensor([-5, 80]), "key_length": torch.tensor([71, 2**40])}
    out, lse = ops.attention(
        *tensors, **{n: r.to(backend.device) for n, r in rows.items()}, return_lse=True
    )
    whole = ops.attention(*tensors, return_lse=True)
    assert torch.equal(out[0], whole[0][0]) and torch.equal(lse[0], whole[1][0])
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_scores(backend, dtype):
    """All -inf: as if nothing were seen. One +inf: no output, and lse is +inf."""
    q, k, v = inputs(1, 1, 3, 6, 16, dtype)
    q[...], k[...] = 1, 1
    k[0, 0, :4, 0] = -math.inf
    k[0, 0, 5, 0] = math.inf
    out, lse = ops.attention(*(t.to(backend.device) for t in (q, k, v)), return_lse=True)
    assert (out[0, 0, 0] == 0).all() and lse[0, 0, 0] == -math.inf
    assert torch.equal(out[0, 0, 1].cpu(), v[0, 0, 4]) and lse[0, 0, 1].isfinite()
    assert out[0, 0, 2].isnan().all()
    assert lse[0, 0, 2] == math.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", [0, 70, 599])
def test_a_score_of_plus_infinity_among_many_keys(backend, dtype, place):
    """Wherever it stands, for one query (whose keys are split over threads) and for many."""
    for queries in (1, 40):
        q, k, v = inputs(2, 1, queries, 600, 16, dtype)
        q[...] = 1
        k[0, 0, place, 0] = math.inf
        there = [t.to(backend.device) for t in (q, k, v)]
        out, lse = ops.attention(*there, causal=False, return_lse=True)
        assert (lse == math.inf).all() and out.isnan().all()
        assert ops.reference.attention(q, k, v, causal=False, return_lse=True)[1].eq(math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [3, 5, 7])
def test_groups_that_are_no_power_of_two(backend, group, dtype):
    """One query of every head of a group, and many."""
    assert_accurate(backend, inputs(2 * group, 2, 1, 70, 24, dtype))
    assert_accurate(backend, inputs(group, 1, 41, 70, 24, dtype), window=30)


@pytest.mark.parametrize("dtype", DTYPES)
def test_growing_scores_rescale_what_was_summed(backend, dtype):
    """Each tile of keys outweighs all before it, and the last takes nearly all."""
    q, k, v = inputs(1, 1, 20, 400, 32, dtype)
    q, k = q.abs(), k.abs() * torch.linspace(0, 6, 400)[:, None].to(dtype)
    exact = ops.reference.attention(q.double(), k.double(), v.double())
    got = ops.attention(*(t.to(backend.device) for t in (q, k, v)))
    assert_as_accurate(got, ops.reference.attention(q, k, v), exact)


def test_last_rows_that_see_nothing_may_be_nan(backend):
    """A window that has left the last key behind, in a tile of rows that others use."""
    q, k, v = inputs(2, 1, 40, 60, 24, torch.bfloat16)
    q[:, :, 33:] = math.nan
    arguments = {"query_start": 38, "window": 12}
    got = results(ops.attention, (q, k, v), backend.device, **arguments)
    for t in (got[0], *got[2:]):
        assert t.isfinite().all()
    assert (got[1][:, :, 33:] == -math.inf).all() and (got[2][:, :, 33:] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_seen_may_be_nan(backend, dtype):
    """Rows without keys and keys without rows, in tiles that others use; also gradients."""
    q, k, v = inputs(2, 1, 100, 150, 24, dtype, batch=2)
    arguments = {"query_start": -30, "key_start": torch.tensor([0, 5])}
    expected = results(ops.attention, (q, k, v), backend.device, **arguments)
    seen_rows, seen_keys = slice(35, None), slice(5, 70)
    poisoned = [torch.full_like(t, math.nan) for t in (q, k, v)]
    for t, p, seen in zip((q, k, v), poisoned, (seen_rows, seen_keys, seen_keys), strict=True):
        p[:, :, seen] = t[:, :, seen]
    poisoned[0][0, :, 30:35] = q[0, :, 30:35]
    for p, t in zip(poisoned[1:], (k, v), strict=True):
        p[0, :, :5] = t[0, :, :5]
    got = results(ops.attention, poisoned, backend.device, **arguments)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)
