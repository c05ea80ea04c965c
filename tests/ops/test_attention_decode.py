"""ops.attention where few queries share each key: read from where they lie, turned by offsets."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_as_accurate
from support.threads import threads

from longrope import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def heads(shape, head_dim, dtype, batch=1):
    """q, k and v for (H, Hk, N, M)."""
    heads, kv_heads, queries, keys = shape
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, head_dim).to(dtype) for h, n in shapes]


def assert_accurate(tensors, **arguments):
    exact = ops.reference.attention(*(t.double() for t in tensors), **arguments, return_lse=True)
    low = ops.reference.attention(*tensors, **arguments, return_lse=True)
    got = ops.attention(*tensors, **arguments, return_lse=True)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)
    return got


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7])
def test_every_number_of_rows_that_share_a_key(isa, group, dtype):
    """And every remainder of keys in a tile, over a bound of a block."""
    for keys in (1, 127, 130, 133):
        assert_accurate(heads((2 * group, 2, 1, keys), 64, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 16, 31, 33, 40, 72, 80, 96, 100, 256])
def test_rows_that_no_load_divides(isa, head_dim, dtype):
    assert_accurate(heads((3, 1, 2, 150), head_dim, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_queries_over_parts_of_the_keys(isa, dtype):
    """Causal among the queries, each row of the batch at a place of its own, one with no key."""
    tensors = heads((4, 2, 5, 2300), 48, dtype, batch=4)
    start = torch.tensor([2295, 1000, 3, -7])
    _, lse = assert_accurate(tensors, query_start=start, key_length=start.clamp(0) + 5)
    assert (lse[3] == -math.inf).all()
    assert_accurate(tensors, query_start=start, window=1200, softcap=3.0, scale=-0.2)


def layouts(dtype):
    """q, k and v in memory as caches and projections have them, by name."""
    q, k, v = heads((6, 2, 2, 300), 40, dtype, batch=2)
    shared = (t[:1].expand(2, -1, -1, -1) for t in (k, v))
    yield "one cache for the batch", (q, *shared)
    yield "one head for all", (q, *(t[:, :1].expand(-1, 2, -1, -1) for t in (k, v)))
    yield "one key for all", (q, *(t[:, :, :1].expand(-1, -1, 300, -1) for t in (k, v)))
    turned = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    yield "tokens before heads", tuple(turned)
    fused = torch.randn(2, 300, 2, 80).to(dtype)
    yield "keys beside values", (q, *fused.transpose(1, 2).split(40, -1))
    shifted = [torch.randn(t.numel() + 1).to(dtype)[1:].view(t.shape) for t in (q, k, v)]
    yield "off every boundary", tuple(shifted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(isa, dtype):
    for name, tensors in layouts(dtype):
        try:
            assert_accurate(tensors)
        except AssertionError as error:
            raise AssertionError(f"{name}: {error}") from error


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_but_what_a_query_sees_is_used(isa, dtype):
    """NaN before, behind and beside the keys, and in queries that see none."""
    for head_dim in (40, 64):
        wide = [torch.full((2, h, n, head_dim + 11), math.nan, dtype=dtype)
                for h, n in ((4, 3), (2, 600), (2, 600))]  # fmt: skip
        q, k, v = (x[..., 5 : 5 + head_dim] for x in wide)
        q[:, :, 1:] = torch.randn(2, 4, 2, head_dim).to(dtype)
        for x in (k, v):
            x[:, :, 130:450] = torch.randn(2, 2, 320, head_dim).to(dtype)
        arguments = {
            "key_start": 130,
            "key_length": torch.tensor([450, 301]),
            "query_range": (1, 3),
        }
        out, lse = assert_accurate((q, k, v), **arguments)
        assert not out.isnan().any() and (lse[:, :, 0] == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [36, 64])
def test_infinite_scores(isa, head_dim, dtype):
    """A key that holds an infinity takes nothing, or no key is left: never NaN from zeros."""
    for element in (0, head_dim - 9, head_dim - 1):
        q, k, v = heads((2, 1, 1, 200), head_dim, dtype)
        q = q.abs() + 0.1
        k[:, :, 150, element] = -math.inf
        assert_accurate((q, k, v))
    k[:] = -math.inf
    out, lse = ops.attention(q, k, v, return_lse=True)
    assert (out == 0).all() and (lse == -math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_backward_takes_what_the_forward_gives(isa, dtype):
    tensors = heads((4, 2, 3, 1500), 64, dtype)

    def gradients(function, leaves):
        leaves = [t.detach().requires_grad_() for t in leaves]
        out, lse = function(*leaves, return_lse=True)
        return torch.autograd.grad(out.to(lse.dtype).square().sum() + lse.sum(), leaves)

    exact = gradients(ops.reference.attention, [t.double() for t in tensors])
    low = gradients(ops.reference.attention, tensors)
    for name, *results in zip("qkv", gradients(ops.attention, tensors), low, exact, strict=True):
        assert_as_accurate(*results, name=f"gradient of {name}")


def turned(queries, keys, by_row=None, pairs=16, limits=(1000, 2000), **changes):
    """Tiers that differ in everything, for positions that may be of each row."""
    rows = () if by_row is None else (by_row,)
    arguments = {
        "inv_freq": torch.rand(*rows, len(limits), pairs, dtype=torch.float64),
        "query_positions": queries,
        "key_positions": keys,
        "limits": torch.tensor(limits),
        "start_tokens": torch.randint(20, 90, (*rows, len(limits))),
        "base_inv_freq": torch.rand(*rows, pairs, dtype=torch.float64),
        "attention_factor": torch.rand(*rows, len(limits), dtype=torch.float64) + 0.5,
    }
    return ops.Rotation(**(arguments | changes))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
def test_turned_inside(isa, interleaved, dtype):
    """Start tokens in a block's middle, far positions, whole and part rotation, odd pairs.

    Of one to four rows, which turn in registers, pairs and what is behind them in loads that
    overlap or do not; and of six.
    """
    shapes = ((64, 32), (64, 8), (40, 20), (48, 9), (75, 20), (80, 24), (56, 13), (52, 20))
    for head_dim, pairs in shapes:
        for heads_of_q, queries in ((6, 2), (2, 1), (4, 1), (6, 1), (8, 1)):
            for first in (0, -30, 2**40):
                positions = first + torch.arange(300)
                rotation = turned(
                    positions[-queries:] + 0, positions, pairs=pairs, limits=(first + 299, 2**50),
                    interleaved=interleaved,
                )  # fmt: skip
                tensors = heads((heads_of_q, 2, queries, 300), head_dim, dtype)
                assert_accurate(tensors, rotation=rotation)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [52, 75])
def test_infinite_scores_of_keys_that_turn(isa, head_dim, dtype):
    """An infinity of the query or of a key, where loads overlap, counts once and makes no NaN."""
    rotation = turned(torch.tensor([99]), torch.arange(100), pairs=20)
    for held_by_key in (False, True):
        q, k, v = (x.abs() for x in heads((2, 1, 1, 100), head_dim, dtype))
        (k[:, :, 50:60] if held_by_key else q)[..., min(68, head_dim - 1)] = math.inf
        _, lse = ops.attention(q, k, v, rotation=rotation, return_lse=True)
        assert (lse == math.inf).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_turned_inside_by_row(isa, dtype):
    """Each row has tiers, positions and a length of its own, over parts of the keys."""
    first = torch.tensor([0, 500, 2**30])[:, None]
    length = torch.tensor([2100, 1700, 0])
    rotation = turned(
        first + length[:, None] - 3 + torch.arange(3), first + torch.arange(2100), by_row=3,
        limits=(2098, 2199, 2**40),
    )  # fmt: skip
    arguments = {"key_length": length, "query_start": length - 3}
    assert_accurate(heads((4, 2, 3, 2100), 40, dtype, batch=3), rotation=rotation, **arguments)


def test_turned_by_any_positions(isa):
    """Positions with holes, or padding that repeats them, are no offsets of one another."""
    tensors = heads((4, 2, 1, 300), 40, torch.float32)
    positions = torch.arange(300) + (torch.arange(300) > 170)
    assert_accurate(tensors, rotation=turned(positions[-1:], positions))
    padded = (torch.arange(300) - 100).clamp(0)
    rotation = turned(padded[-1:], padded)
    padding = assert_accurate(tensors, rotation=rotation, key_start=100)
    whole = assert_accurate(tensors, rotation=rotation)
    assert not torch.equal(padding[0], whole[0])


def test_offsets_are_exact_far_out(isa):
    """The same scores wherever the tokens stand: only distances turn the first tier."""
    q, k, v = heads((4, 2, 1, 500), 64, torch.float32)
    inv_freq = 10000.0 ** -(torch.arange(32, dtype=torch.float64) / 32)
    results = []
    for first in (0, 2**21 + 7, 2**44):
        positions = first + torch.arange(500)
        rotation = ops.Rotation(inv_freq, positions[-1:], positions)
        results.append(ops.attention(q, k, v, rotation=rotation))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=0, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    tensors = heads((4, 2, 2, 3000), 64, dtype)
    rotation = turned(torch.arange(2998, 3000), torch.arange(3000))
    for arguments in ({}, {"rotation": rotation}):
        results = []
        for count in (1, 2, 3):
            with threads(count):
                results.append(ops.attention(*tensors, **arguments, return_lse=True))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
