"""ops.attention by the kernel of compute capability 9.0: bodies of other tests, and its own edges.

Its blocks take 192 or 128 queries of one head and tiles of 128 or 64 keys, through rings of two or
three.
"""

from __future__ import annotations

import math

import pytest
import torch
from emulation.build import compiler
from ops import test_attention as plain
from ops import test_attention_tiers as tiers
from ops import test_attention_tiles as tiles
from support import backends
from support.criterion import assert_as_accurate
from support.views import moved

from longrope import ops

DTYPES = [torch.bfloat16, torch.float16]


@pytest.fixture(params=backends.wgmma_names())
def backend(request):
    """Attend by that kernel wherever it can."""
    with backends.use(request.param) as used:
        yield used


def assert_accurate(backend, tensors, **arguments):
    """Out and lse; test_attention_wgmma_gradients.py has the gradients."""
    plain.assert_accurate(backend, tensors, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", plain.CASES)
def test_what_queries_see(backend, case, dtype):
    plain.test_accuracy(backend, case, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [1, 13, 64, 80, 96, 112, 128, 200, 256])
def test_head_dims(backend, head_dim, dtype):
    """Three classes; columns behind head_dim are zeros."""
    assert_accurate(backend, tiles.inputs(2, 1, 70, 150, head_dim, dtype))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
def test_rings_wrap_around(backend, head_dim, causal):
    """More tiles than a ring holds, twice; the last tile of rows is not full."""
    keys = {64: 1000, 128: 700, 256: 400}[head_dim]
    assert_accurate(backend, tiles.inputs(2, 1, 200, keys, head_dim, torch.bfloat16), causal=causal)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_windows_leave_tiles_out_at_both_ends(backend, head_dim):
    arguments = {"window": 150, "key_start": 37, "query_range": (10, 390), "query_start": 100}
    assert_accurate(backend, tiles.inputs(1, 1, 400, 500, head_dim, torch.bfloat16), **arguments)


@pytest.mark.parametrize("layout", ["tokens first", "one for all rows and heads", "one row"])
def test_layouts_of_aligned_tensors(backend, layout):
    """Read where they lie, but for what several heads share: a tensor map cannot say it."""
    q, k, v = tiles.inputs(4, 2, 70, 140, 64, torch.bfloat16, batch=1 if layout == "one row" else 2)
    if layout == "tokens first":
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    elif layout == "one for all rows and heads":
        k, v = (x[:1, :1].expand(x.shape) for x in (k, v))
    else:  # whose stride says nothing
        q, k, v = (x.as_strided(x.shape, (3, *x.stride()[1:])) for x in (q, k, v))
    there = [moved(x, backend.device) for x in (q, k, v)]
    assert [x.stride() for x in there] == [x.stride() for x in (q, k, v)]
    got = ops.attention(*there)
    exact = ops.reference.attention(*(x.double() for x in (q, k, v)))
    assert_as_accurate(got, ops.reference.attention(q, k, v), exact)


def test_softcap(backend):
    assert_accurate(backend, tiles.inputs(2, 2, 140, 300, 64, torch.float16), softcap=1.5)


@pytest.mark.parametrize("group", [3, 5, 7])
def test_groups_that_are_no_power_of_two(backend, group):
    tiles.test_groups_that_are_no_power_of_two(backend, group, torch.bfloat16)


@pytest.mark.parametrize("window", [None, 33])
def test_every_offset_of_a_bound_in_a_tile(backend, window):
    arguments = {"query_start": torch.arange(0, 140, 3), "window": window}
    tensors = tiles.inputs(1, 1, 3, 145, 16, torch.bfloat16, batch=47)
    assert_accurate(backend, tensors, **arguments)


@pytest.mark.parametrize("head_dim", [16, 200])
def test_keys_that_no_query_sees_may_be_nan(backend, head_dim):
    """Before, between and behind the tiles that are read, by every offset of both bounds."""
    start = torch.arange(0, 160, 9)
    q, k, v = tiles.inputs(1, 1, 10, 300, head_dim, torch.bfloat16, batch=len(start))
    arguments = {"query_start": start + 100, "window": 50, "key_length": 290 - start // 3}
    expected = ops.reference.attention(q, k, v, **arguments)
    position, key = start[:, None] + 100 + torch.arange(10), torch.arange(300)
    seen = (key <= position[..., None]) & (key > position[..., None] - 50)
    seen &= key < arguments["key_length"][:, None, None]
    unseen = ~seen.any(1)[:, None, :, None]
    poisoned = [x.masked_fill(unseen, math.nan) for x in (k, v)]
    there = [x.to(backend.device) for x in (q, *poisoned)]
    got = ops.attention(*there, **plain.to(backend.device, arguments))
    torch.testing.assert_close(got.cpu(), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize(
    "body",
    [
        tiles.test_what_is_not_seen_may_be_nan,
        tiles.test_infinite_scores,
        tiles.test_growing_scores_rescale_what_was_summed,
        tiles.test_scale_of_zero,
        tiles.test_unaligned_and_expanded_views,
    ],
    ids=lambda body: body.__name__,
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_like_the_others(backend, body, dtype):
    body(backend, dtype)


@pytest.mark.parametrize(
    "body",
    [
        tiles.test_last_rows_that_see_nothing_may_be_nan,
        tiles.test_bounds_of_rows_beyond_the_keys,
        tiles.test_rows_of_a_block_that_begin_behind_its_first_keys,
    ],
    ids=lambda body: body.__name__,
)
def test_like_the_others_in_bfloat16(backend, body):
    body(backend)


@pytest.mark.parametrize(
    "case", [tiers.crossing, tiers.rows_apart, tiers.window_on_a_cache, tiers.some_of_the_queries]
)
def test_tiers(backend, case):
    tiers.test_accuracy(backend, case, torch.bfloat16)


@pytest.mark.parametrize("place", [0, 599])
def test_a_score_of_plus_infinity_among_many_keys(backend, place):
    tiles.test_a_score_of_plus_infinity_among_many_keys(backend, torch.float16, place)


@pytest.fixture
def kernel_of(monkeypatch):
    """Tell which kernel attends (queries, heads) of a dtype, by a choice, on a device."""
    from emulation import attention, library

    monkeypatch.setattr(library.Runtime, "ORDERS", ("forward",))

    def kernel_of(choice, capability, queries, heads, dtype=torch.bfloat16):
        q, k, v = tiles.inputs(heads, 1, queries, 9, 8, dtype)
        bounds = (0, None, 0, None, 9, None, 0, None, queries, None)
        with library.attention_kernel(choice, capability):
            attention.attention(q, k, v, False, *bounds, 0, 1.0, 0.0)
        return library.runtime().last_kernel()

    return kernel_of


@pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
def test_what_decides_which_kernel_attends(kernel_of):
    """Capability, dtype, full tiles of queries, and 66 blocks of them."""
    assert kernel_of("auto", 90, 128, 66) == "attention_sm90"
    assert kernel_of("auto", 90, 127, 66) == "attention"
    assert kernel_of("auto", 90, 128, 65) != "attention_sm90"
    for capability in (80, 86, 100, 120):
        assert kernel_of("auto", capability, 128, 66) == "attention"
        assert kernel_of("wgmma", capability, 128, 66) == "attention"
    assert kernel_of("mma", 90, 128, 66) == "attention"
    assert kernel_of("wgmma", 90, 1, 1) == "attention_sm90"
    assert kernel_of("wgmma", 90, 1, 1, torch.float32) != "attention_sm90"
    with pytest.raises(ValueError, match=r'^kernel: expected auto, mma or wgmma, got "hopper"$'):
        kernel_of("hopper", 90, 1, 1)
