"""ops.attention against its specification, on every backend: values, log-sum-exps, gradients."""

from __future__ import annotations

import math

import pytest
import torch
from support import backends
from support.criterion import assert_as_accurate, assert_nonzero_gradient, gradient_floor
from support.views import moved
from torch.utils._pytree import tree_map

from longrope import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: What queries may see, by name: (H, Hk, N, M) and the arguments of ops.attention.
CASES = {
    "causal": ((4, 2, 37, 37), {}),
    "chunk on a cache": ((4, 1, 19, 83), {}),
    "not causal": ((2, 2, 21, 34), {"causal": False}),
    "starts outside": ((2, 1, 23, 40), {"query_start": torch.tensor([-7, 60])}),
    "padding left and right": (
        (3, 3, 18, 70),
        {"key_start": torch.tensor([0, 33]), "key_length": torch.tensor([41, 70])},
    ),
    "static cache": ((2, 1, 5, 90), {"query_start": 30, "key_length": 35}),
    "window": ((2, 1, 50, 75), {"window": 9}),
    "window, not causal": ((2, 2, 20, 20), {"window": 4, "causal": False}),
    "softcap and scale": ((2, 1, 33, 33), {"softcap": 1.5, "scale": 0.4}),
    "one query": ((4, 2, 1, 130), {}),
    "more queries than keys": ((2, 2, 30, 11), {}),
    "some of the queries": (
        (4, 2, 33, 40),
        {"query_range": (torch.tensor([5, -(2**40)]), torch.tensor([21, 2**40])), "window": 20},
    ),
}


def inputs(shape, head_dim, dtype, batch=2):
    heads, kv_heads, queries, keys = shape
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return tuple(torch.randn(batch, h, n, head_dim).to(dtype) for h, n in shapes)


def to(device, arguments):
    return tree_map(lambda a: a.to(device) if torch.is_tensor(a) else a, arguments)


def assert_accurate(backend, tensors, arguments):
    """Compare out and lse with float64, judged by the error of plain torch in the dtype."""
    exact = ops.reference.attention(*(t.double() for t in tensors), **arguments, return_lse=True)
    low = ops.reference.attention(*tensors, **arguments, return_lse=True)
    got = ops.attention(
        *(t.to(backend.device) for t in tensors), **to(backend.device, arguments), return_lse=True
    )
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(backend, case, dtype):
    shape, arguments = CASES[case]
    assert_accurate(backend, inputs(shape, 40, dtype), arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 13, 64, 96, 128, 256])
def test_accuracy_by_head_dim(backend, head_dim, dtype):
    assert_accurate(backend, inputs((2, 1, 20, 70), head_dim, dtype, batch=1), {})


def test_no_head_dim_beyond_256():
    for device in {"cpu", "meta", "cuda"} & {"cpu", "meta", *backends.names()}:
        q, k, v = (t.to(device) for t in inputs((1, 1, 2, 2), 257, torch.float32))
        with pytest.raises(ValueError, match="256"):
            ops.attention(q, k, v)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_see_nothing_give_zero(backend, dtype):
    """And -inf, and a zero gradient; whatever the unseen keys hold."""
    q, k, v = inputs((2, 1, 6, 9), 16, dtype)
    k[:, :, 4:], v[:, :, 4:] = math.nan, math.inf
    q, k, v = (t.to(backend.device).requires_grad_() for t in (q, k, v))
    out, lse = ops.attention(q, k, v, query_start=-3, key_length=4, return_lse=True)
    assert (out[:, :, :3] == 0).all() and (lse[:, :, :3] == -math.inf).all()
    assert out.isfinite().all() and lse[:, :, 3:].isfinite().all()
    (out.float().sum() + lse[:, :, 3:].sum()).backward()
    for t in (q, k, v):
        assert t.grad.isfinite().all()
    assert (q.grad[:, :, :3] == 0).all() and (k.grad[:, :, 4:] == 0).all()
    assert (v.grad[:, :, 4:] == 0).all() and (v.grad[:, :, :3] != 0).any()
    nothing = ops.attention(q, k, v, key_length=0, return_lse=True)
    assert (nothing[0] == 0).all() and (nothing[1] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_queries_out_of_range_see_nothing_and_change_nothing(backend, dtype):
    """The others are bit for bit as without a range, whatever those out of range hold."""
    tensors = [t.to(backend.device) for t in inputs((4, 2, 150, 150), 24, dtype)]
    begin, end = torch.tensor([0, 37]), torch.tensor([64, 131])
    within = torch.arange(150) >= begin[:, None]
    within = (within & (torch.arange(150) < end[:, None]))[:, None].to(backend.device)

    def results(q, **arguments):
        leaves = [t.detach().requires_grad_() for t in (q, *tensors[1:])]
        out, lse = ops.attention(*leaves, **arguments, return_lse=True)
        # Only those within have an influence; a NaN beside them would show in the gradients.
        grad_out = torch.where(within[..., None], torch.ones_like(out), math.nan)
        if not arguments:
            grad_out = grad_out.nan_to_num()
        return out, lse, torch.autograd.grad(out, leaves, grad_out)

    arguments = {"query_range": (begin.to(backend.device), end.to(backend.device))}
    out, lse, grads = results(torch.where(within[..., None], tensors[0], math.nan), **arguments)
    whole_out, whole_lse, whole_grads = results(tensors[0])
    assert torch.equal(out, whole_out.masked_fill(~within[..., None], 0))
    assert torch.equal(lse, whole_lse.masked_fill(~within, -math.inf))
    assert (grads[0][~within[..., None].expand_as(grads[0])] == 0).all()
    for got, expected in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(got, expected)
    assert (ops.attention(*tensors, query_range=(20, 20)) == 0).all()


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_views_of_poisoned_memory(backend, dtype, token_major):
    """Nothing outside the views and nothing unseen is read."""
    big = torch.full((3, 2, 9, 60, 80), math.nan, dtype=dtype)
    views = []
    for tensor, (heads, tokens) in zip(big, ((4, 12), (2, 20), (2, 20)), strict=True):
        view = tensor[:, 1 : 1 + 2 * heads : 2, 3 : 3 + 2 * tokens : 2, 8:72]
        if token_major:  # [B, N, H, D] in memory
            wide = torch.full((2, tokens, 9, 80), math.nan, dtype=dtype)
            view = wide[:, :, 1 : 1 + heads, 8:72].transpose(1, 2)
        view.copy_(torch.randn(view.shape))
        views.append(view)
    exact = ops.reference.attention(*(t.double() for t in views))
    got = ops.attention(*(moved(t, backend.device) for t in views))
    assert_as_accurate(got, ops.reference.attention(*views), exact)
    assert (got.stride(1) < got.stride(2)) == token_major


def test_huge_scores_do_not_overflow(backend):
    q, k, v = inputs((2, 2, 9, 33), 32, torch.float32)
    tensors = (q * 1e4, k * 1e4, v)
    expected = ops.reference.attention(*(t.double() for t in tensors))
    got = ops.attention(*(t.to(backend.device) for t in tensors)).cpu()
    torch.testing.assert_close(got, expected.float(), rtol=1e-4, atol=1e-4)


def test_a_query_that_is_not_finite_spoils_its_own_row_alone(backend):
    q, k, v = inputs((1, 1, 8, 8), 16, torch.float32, batch=1)
    q[0, 0, 2, 0] = math.nan
    out = ops.attention(*(t.to(backend.device) for t in (q, k, v))).cpu()
    assert out[0, 0, 2].isnan().all() and out.isnan().sum() == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "case", ["causal", "starts outside", "window", "softcap and scale", "some of the queries"]
)
def test_gradients(backend, case, dtype):
    """Of q, k and v, through out and lse, within twice the error of plain torch in the dtype."""
    shape, arguments = CASES[case]
    tensors = inputs(shape, 40, dtype)
    batch, heads, queries, _ = tensors[0].shape
    to_out, to_lse = torch.randn(batch, heads, queries, 40), torch.randn(batch, heads, queries)

    def gradients(function, leaves, arguments):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out, lse = function(*leaves, **arguments, return_lse=True)
        seen = lse != -math.inf
        loss = (out.to(lse.dtype) * to_out.to(lse)).sum()
        (loss + (lse.masked_fill(~seen, 0) * to_lse.to(lse)).sum()).backward()
        assert_nonzero_gradient(*leaves)
        return [*(t.grad for t in leaves), lse.detach()]

    exact = gradients(ops.reference.attention, [t.double() for t in tensors], arguments)
    low = gradients(ops.reference.attention, tensors, arguments)
    there = [t.to(backend.device) for t in tensors]
    got = gradients(ops.attention, there, to(backend.device, arguments))
    for name, *results in zip("qkv", got[:3], low[:3], exact[:3], strict=True):
        floor = gradient_floor(results[2], dtype, exact[3])
        assert_as_accurate(*results, floor=floor, name=f"gradient of {name}")


def rotation_of(backend, queries, keys, rows, interleaved):
    shape = (2, 9) if rows else (9,)
    tensors = {
        "inv_freq": torch.rand(shape, dtype=torch.float64),
        "query_positions": torch.arange(keys - queries, keys) + 2**20,
        "key_positions": torch.arange(keys) + 2**20,
        "start_tokens": torch.tensor([3, 2**20 + 10]) if rows else 2**20 + 4,
        "base_inv_freq": torch.rand(9, dtype=torch.float64),
        "attention_factor": torch.tensor([1.1, 0.9], dtype=torch.float64) if rows else 1.2,
    }
    here = ops.Rotation(**tensors, interleaved=interleaved)
    return here, ops.Rotation(**to(backend.device, tensors), interleaved=interleaved)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
def test_rotation_inside(backend, dtype, rows, interleaved):
    """Un-rotated queries and keys, turned by exact phases; the last dimensions are not."""
    q, k, v = inputs((4, 2, 11, 43), 24, dtype)
    here, there = rotation_of(backend, 11, 43, rows, interleaved)
    exact = ops.reference.attention(q.double(), k.double(), v.double(), rotation=here)
    low = ops.reference.attention(q, k, v, rotation=here)
    got = ops.attention(*(t.to(backend.device) for t in (q, k, v)), rotation=there)
    assert_as_accurate(got, low, exact)


def test_rotation_inside_has_gradients(backend):
    """Those of frequencies are differences of sums a million times as large, of positions."""
    tensors = inputs((2, 1, 7, 12), 24, torch.float32)
    here, there = rotation_of(backend, 7, 12, True, False)

    def gradients(function, tensors, rotation):
        leaves = [t.detach().requires_grad_() for t in tensors]
        leaves += [rotation.inv_freq.requires_grad_(), rotation.attention_factor.requires_grad_()]
        out, lse = function(*leaves[:3], rotation=rotation, return_lse=True)
        return *torch.autograd.grad(out.square().sum(), leaves), lse.detach()

    *exact, lse = gradients(ops.reference.attention, [t.double() for t in tensors], here)
    *low, _ = gradients(ops.reference.attention, tensors, here)
    *got, _ = gradients(ops.attention, [t.to(backend.device) for t in tensors], there)
    for name, *results in zip(("q", "k", "v", "inv_freq", "factor"), got, low, exact, strict=True):
        floor = gradient_floor(results[2], torch.float32, lse)
        assert_as_accurate(*results, floor=floor, name=f"gradient of {name}")
