"""ops.attention on CPU where rows and keys fill several blocks: whole, in part, merged."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_as_accurate
from support.threads import threads

from longrope import ops

#: (H, Hk, N, M) and the arguments of ops.attention. Blocks are of 96 to 384 rows and 256 keys;
#: from 2048 keys on, few rows attend them in parts that are merged.
CASES = {
    "causal": ((2, 1, 290, 290), {}),
    "chunk on a cache": ((4, 1, 130, 2100), {}),
    "decode step": ((4, 2, 1, 2100), {}),
    "not causal": ((1, 1, 400, 600), {"causal": False}),
    "window": ((2, 2, 300, 700), {"window": 280}),
    "window of one": ((1, 1, 100, 300), {"window": 1}),
    "padding left and right": (
        (2, 1, 101, 600),
        {"key_start": torch.tensor([3, 290]), "key_length": torch.tensor([511, 600])},
    ),
    "some of the queries": (
        (2, 1, 300, 600),
        {"query_range": (torch.tensor([0, 101]), torch.tensor([97, 290]))},
    ),
    "some of the queries on a long cache": ((1, 1, 40, 2100), {"query_range": (7, 30)}),
    "softcap and negative scale": ((2, 2, 100, 300), {"softcap": 2.0, "scale": -0.3}),
}


def inputs(shape, head_dim, dtype):
    heads, kv_heads, queries, keys = shape
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return tuple(torch.randn(2, h, n, head_dim).to(dtype) for h, n in shapes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", CASES)
def test_accuracy(isa, case, dtype):
    shape, arguments = CASES[case]
    tensors = inputs(shape, 36, dtype)
    exact = ops.reference.attention(*(t.double() for t in tensors), **arguments, return_lse=True)
    low = ops.reference.attention(*tensors, **arguments, return_lse=True)
    got = ops.attention(*tensors, **arguments, return_lse=True)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_gradients(isa, case, dtype):
    shape, arguments = CASES[case]
    tensors = inputs(shape, 36, dtype)
    to_out = torch.randn(tensors[0].shape)

    def gradients(function, leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out, lse = function(*leaves, **arguments, return_lse=True)
        loss = (out.to(lse.dtype) * to_out.to(lse)).sum()
        return torch.autograd.grad(loss + lse[lse.isfinite()].square().sum(), leaves)

    exact = gradients(ops.reference.attention, [t.double() for t in tensors])
    low = gradients(ops.reference.attention, tensors)
    got = gradients(ops.attention, tensors)
    for name, *results in zip("qkv", got, low, exact, strict=True):
        assert_as_accurate(*results, name=f"gradient of {name}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_growing_scores_rescale_what_was_summed(isa, dtype):
    """Each block of keys outweighs all before it, and the last of them takes nearly all."""
    q, k, v = inputs((1, 1, 70, 800), 32, dtype)
    q = q.abs()
    k = k.abs() * torch.linspace(0, 6, 800)[:, None].to(dtype)
    exact = ops.reference.attention(q.double(), k.double(), v.double())
    low = ops.reference.attention(q, k, v)
    assert_as_accurate(ops.attention(q, k, v), low, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_no_query_sees_may_be_nan(isa, dtype):
    """Also inside a block of keys, in padding, and in the memory around the views."""
    poisoned = [torch.full((2, 2, n + 9, 50), math.nan, dtype=dtype) for n in (150, 530, 530)]
    q, k, v = (x[:, :, 4:-5, 7:43] for x in poisoned)
    for x, tokens in ((q, slice(None)), (k, slice(70, 400)), (v, slice(70, 400))):
        x[:, :, tokens] = torch.randn(x[:, :, tokens].shape).to(dtype)
    arguments = {"query_start": 250, "key_start": 70, "key_length": 400}
    exact = ops.reference.attention(q.double(), k.double(), v.double(), **arguments)
    got = ops.attention(q, k, v, **arguments)
    assert got.isfinite().all()
    assert_as_accurate(got, ops.reference.attention(q, k, v, **arguments), exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    tensors = inputs((4, 2, 200, 2300), 64, dtype)
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.attention(*tensors, return_lse=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
