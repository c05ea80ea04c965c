"""ops.attention and merge_attention under autograd, torch.compile, and with wrong inputs."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_nonzero_gradient

from longrope import ops

pytestmark = pytest.mark.usefixtures("one_thread")

ATTENTION, GRAD = torch.ops.longrope.attention, torch.ops.longrope.attention_backward

MASKS = {
    "causal": {},
    "not causal": {"causal": False},
    "window and softcap": {"window": 3, "softcap": 1.5},
    "rows": {
        "query_start": torch.tensor([-2, 3]), "key_start": torch.tensor([0, 1]),
        "key_length": torch.tensor([6, 4]),
    },
    "scale": {"scale": -0.7},
    "some of the queries": {"query_range": (torch.tensor([0, 2]), torch.tensor([2, 4]))},
}  # fmt: skip


def problem(dtype=torch.float64, queries=5, keys=6, head_dim=4):
    """q, k, v of two rows, four query heads and two key heads."""
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(2, h, n, head_dim).to(dtype) for h, n in shapes]


def rotation(queries=5, keys=6, **changes):
    """Turn q and k by angles that differ by row of the batch."""
    arguments = {
        "inv_freq": torch.rand(2, 2).double(), "query_positions": torch.arange(queries) + 1,
        "key_positions": torch.arange(keys), "attention_factor": torch.rand(2).double() + 0.5,
    }  # fmt: skip
    return ops.Rotation(**(arguments | changes))


@pytest.mark.parametrize("arguments", MASKS.values(), ids=MASKS)
def test_gradcheck(isa, arguments):
    """Derivatives of out and lse against differences in float64."""
    leaves = [t.requires_grad_() for t in problem()]

    def call(q, k, v):
        out, lse = ops.attention(q, k, v, **arguments, return_lse=True)
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(call, leaves)


def test_gradcheck_through_the_rotation():
    turn = rotation()
    leaves = [*problem(), turn.inv_freq, turn.attention_factor]

    def call(q, k, v, inv_freq, factor):
        return ops.attention(q, k, v, rotation=rotation(inv_freq=inv_freq, attention_factor=factor))

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


def test_no_second_derivative():
    leaves = [t.requires_grad_() for t in problem()]
    (first, *_) = torch.autograd.grad(ops.attention(*leaves).sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [False, True])
def test_opcheck(dtype, rows):
    """Schemas, fake kernels and autograd registrations are what torch.compile expects."""
    q, k, v = problem(dtype)
    k = k.transpose(1, 2).contiguous().transpose(1, 2)
    bounds = (1, None, 0, None, 6, None, 0, None, 5, None)
    if rows:
        bounds = (
            0, torch.tensor([1, -9]), 0, torch.tensor([0, 2]), 0, torch.tensor([6, 4]),
            0, torch.tensor([0, 1]), 0, torch.tensor([4, 5]),
        )  # fmt: skip
    options = (True, *bounds, 3, 0.5, 2.0)
    out, lse = ATTENTION(q, k, v, *options)
    grads = (torch.randn(out.shape).to(dtype), torch.randn(lse.shape))
    torch.library.opcheck(GRAD, (*grads, q, k, v, out, lse, *options))
    q.requires_grad_(), v.requires_grad_()
    torch.library.opcheck(ATTENTION, (q, k, v, *options))


def test_compile():
    """One graph without breaks, forward and backward, also where lengths change."""

    def loss(q, k, v, start):
        first = ops.attention(q, k[:, :, :3], v[:, :, :3], query_start=start, return_lse=True)
        rest = ops.attention(
            q, k[:, :, 3:], v[:, :, 3:], query_start=start - 3, window=9, return_lse=True
        )
        out, lse = ops.merge_attention(*first, *rest)
        return out.square().sum() + lse.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for queries, keys in ((4, 6), (5, 9), (7, 12)):
        leaves = [t.requires_grad_() for t in problem(torch.float32, queries, keys)]
        start = torch.tensor([keys - queries, 1])
        got = torch.autograd.grad(compiled(*leaves, start), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves, start), leaves))


def test_compile_with_rotation():
    def turned(q, k, v, turn):
        return ops.attention(q, k, v, rotation=turn, softcap=5.0)

    q, k, v = problem(torch.bfloat16)
    turn = rotation()
    compiled = torch.compile(turned, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(q, k, v, turn), turned(q, k, v, turn))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_of_views_reach_their_base(dtype):
    """[B, N, H, D] in memory, and an incoming gradient with strides of zero."""
    base = torch.randn(3, 2, 7, 2, 8).to(dtype).requires_grad_()
    q, k, v = (t.transpose(1, 2) for t in base)
    ops.attention(q, k, v).sum().backward()  # the gradient of sum is an expanded scalar
    leaves = [t.detach().contiguous().requires_grad_() for t in (q, k, v)]
    ops.attention(*leaves).backward(torch.ones(2, 2, 7, 8).to(dtype))
    assert_nonzero_gradient(*leaves[1:])
    for view, leaf in zip(base.grad, leaves, strict=True):
        torch.testing.assert_close(view.transpose(1, 2), leaf.grad)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_scale_of_zero_gives_the_mean(isa, dtype):
    q, k, v = problem(dtype, queries=2)
    got = ops.attention(q, k, v, scale=0)
    mean = torch.stack([v[:, :, :5].double().mean(2), v.double().mean(2)], 2)
    torch.testing.assert_close(got, mean.repeat_interleave(2, 1).to(dtype))


def wrong_inputs():
    q, k, v = problem(torch.float32)
    yield (q[0], k, v), {}, r"q: expected float32 \[B, heads, tokens, D\], got float32 \[4, 5, 4"
    yield (q.int(), k.int(), v.int()), {}, r"q: expected float32, bfloat16.*got int32"
    yield (q, k[0], v), {}, r"k: expected float32 \[2, heads, tokens, 4\], got"
    yield (q, k.bfloat16(), v), {}, r"k: expected float32 .*got bfloat16"
    yield (q, k, v.double()), {}, r"v: expected float32 .*got float64"
    yield (q, k[:1], v), {}, r"k: expected float32 \[2, heads"
    yield (q[:, :3], k, v), {}, r"k: expected a number of heads that divides the 3.*got 2"
    yield (q, k[:, :0], v[:, :0]), {}, r"k: expected a number of heads"
    yield (q, k, v[:, :, :5]), {}, r"v: expected float32 \[2, 2, 6, 4\]"
    yield (q, k[..., :3], v), {}, r"k: expected .*4\], got"
    yield (q[..., :0], k[..., :0], v[..., :0]), {}, r"q: expected head_dim 1 to 256, got 0"
    yield (torch.ones(2, 4, 5, 8)[..., ::2], k, v), {}, r"q: expected stride 1 in the last"
    yield (q, k, v), {"query_start": 1.5}, r"query_start: expected an int or int64 \[B\], got 1.5"
    yield (q, k, v), {"query_start": 2**63}, r"query_start: expected"
    yield (q, k, v), {"query_start": torch.ones(2)}, r"query_start: .* \[2\], got float32 \[2\]"
    yield (q, k, v), {"key_start": torch.ones(3).long()}, r"key_start: expected .* \[2\], got"
    yield (q, k, v), {"key_start": -1}, r"key_start: expected 0 to 6 \(the keys\), got -1"
    yield (q, k, v), {"key_length": 7}, r"key_length: expected 0 to 6 \(the keys\), got 7"
    yield (q, k, v), {"key_length": torch.tensor([6, 7])}, r"key_length: expected 0 to 6"
    yield (q, k, v), {"query_range": 3}, r"query_range: expected a tuple of two, .*, got 3"
    yield (q, k, v), {"query_range": (1, 2, 3)}, r"query_range: expected a tuple of two"
    yield (q, k, v), {"query_range": (1.5, 2)}, r"query_range: expected an int or int64 \[B\], got"
    half = (torch.ones(2).long(), torch.ones(2))
    yield (q, k, v), {"query_range": half}, r"query_range: expected .* \[2\], got float32 \[2\]"
    yield (q, k, v), {"query_range": (0, torch.ones(3).long())}, r"query_range: expected .* \[2\]"
    yield (q, k, v), {"window": 0}, r"window: expected an int of 1 or more, or None, got 0"
    yield (q, k, v), {"window": 2.0}, r"window: expected an int"
    yield (q, k, v), {"window": 2**70}, r"window: expected an int"
    yield (q, k, v), {"softcap": 0}, r"softcap: expected a positive number"
    yield (q, k, v), {"softcap": math.inf}, r"softcap: expected a positive number"
    yield (q, k, v), {"softcap": "2"}, r"softcap: expected a positive number"
    yield (q, k, v), {"scale": math.nan}, r"scale: expected a finite number, got nan"
    yield (q, k, v), {"scale": "1"}, r"scale: expected a finite number"
    yield (q, k, v), {"causal": "yes"}, r"causal: expected a bool"
    yield (q, k, v), {"rotation": 3}, r"rotation: expected an ops.Rotation, or None, got 3"
    yield (q, k, v), {"rotation": rotation(queries=4)}, r"query_positions: expected int64 \[5\]"
    yield (q, k, v), {"rotation": rotation(keys=5)}, r"key_positions: expected int64 \[6\]"
    wide = rotation(inv_freq=torch.rand(3).double())
    yield (q, k, v), {"rotation": wide}, r"inv_freq: expected 1 to 2 frequencies|rotation: expected"
    yield (q.numpy(), k, v), {}, r"q: expected a tensor"
    yield (q.to_sparse(), k, v), {}, r"q: expected a dense tensor"
    yield (q.to("meta"), k, v), {}, r"k: expected device meta, got cpu"
    yield (q, k.to("meta"), v), {}, r"k: expected device cpu, got meta"


@pytest.mark.parametrize(("tensors", "arguments", "message"), list(wrong_inputs()))
def test_wrong_inputs(tensors, arguments, message):
    """Each gets one sentence that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        ops.attention(*tensors, **arguments)
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()


def test_autocast_takes_its_dtype():
    """As scaled_dot_product_attention does, also of queries in another dtype than values."""
    q, k, v = torch.randn(3, 1, 2, 9, 16).unbind()
    expected = ops.attention(q.bfloat16(), k.bfloat16(), v.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.attention(q, k, v.bfloat16())
    assert torch.equal(got, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.attention(q.double(), k.double(), v.double()).dtype == torch.float64
