"""ops.attention whose queries pick their tier of frequencies by position, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_as_accurate
from support.threads import threads

from longrope import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def moved(arguments, device):
    """Return arguments of ops.attention on a device."""

    def there(a):
        if isinstance(a, ops.Rotation):
            return ops.Rotation(**{n: there(x) for n, x in vars(a).items()})
        if isinstance(a, tuple):
            return tuple(map(there, a))
        return a.to(device) if torch.is_tensor(a) else a

    return {n: there(a) for n, a in arguments.items()}


def in_double(arguments):
    return {n: a.double() if n in ("q", "k", "v") else a for n, a in arguments.items()}


def heads(shape, head_dim=24, dtype=torch.float32):
    """q, k and v of a batch of B rows: (B, H, Hk, N, M)."""
    batch, q_heads, k_heads, queries, keys = shape
    shapes = ((q_heads, queries), (k_heads, keys), (k_heads, keys))
    tensors = (torch.randn(batch, h, n, head_dim).to(dtype) for h, n in shapes)
    return dict(zip("qkv", tensors, strict=True))


def rotation(queries, keys, limits, pairs=9, by_row=None, **changes):
    """Tiers that differ in everything; `by_row` gives each of so many rows of its own."""
    rows, tiers = (() if by_row is None else (by_row,)), len(limits)
    arguments = {
        "inv_freq": torch.rand(*rows, tiers, pairs, dtype=torch.float64),
        "query_positions": torch.as_tensor(queries),
        "key_positions": torch.as_tensor(keys),
        "limits": torch.tensor(limits),
        "start_tokens": torch.randint(0, 9, (*rows, tiers)),
        "base_inv_freq": torch.rand(*rows, pairs, dtype=torch.float64),
        "attention_factor": torch.rand(*rows, tiers, dtype=torch.float64) + 0.5,
    }
    return ops.Rotation(**(arguments | changes))


def crossing(dtype):
    """One prefill over three tiers, none of whose limits is a block's."""
    return heads((1, 2, 1, 70, 70), dtype=dtype) | {
        "rotation": rotation(torch.arange(70), torch.arange(70), [21, 50, 60])
    }


def rows_apart(dtype, far=2**20):
    """Each row begins and ends in other tiers, far out, and has a length of its own."""
    start = torch.tensor([0, far, far + 31, 2 * far])[:, None]
    return heads((4, 4, 2, 21, 45), dtype=dtype) | {
        "rotation": rotation(
            start + torch.arange(21) + 24, start + torch.arange(45), [40, far + 40, 2 * far, 2**40],
            by_row=4,
        ),
        "key_length": torch.tensor([45, 40, 45, 30]),
    }  # fmt: skip


def rows_near(dtype):
    """The gradient of a frequency is a sum of as many times the position."""
    return rows_apart(dtype, 2**8)


def left_padding(dtype):
    """Padding has position 1, as transformers says, or none at all."""
    positions = torch.stack([torch.ones(9), torch.zeros(9), torch.arange(9)]).long()
    real = (torch.arange(38) - torch.tensor([0, 5, 0])[:, None]).clamp(0)
    positions = torch.cat([positions, real + torch.tensor([[0], [0], [9]])], 1)
    return heads((3, 2, 2, 47, 47), dtype=dtype) | {
        "rotation": rotation(positions, positions, [8, 16, 32]),
        "key_start": torch.tensor([9, 14, 0]),
        "softcap": 3.0,
    }


def window_on_a_cache(dtype):
    """Queries of two tiers that each see the keys of a window alone; pairs interleaved."""
    return heads((2, 6, 2, 30, 83), dtype=dtype) | {
        "rotation": rotation(
            torch.arange(53, 83),
            torch.arange(83),
            [60, 70],
            interleaved=True,
            start_tokens=torch.tensor([45, 62]),
        ),
        "window": 20,
        "scale": 0.3,
    }


def one_query(dtype):
    """A decode step of rows in three tiers on a static cache."""
    at = torch.tensor([3, 130, 77])
    return heads((3, 4, 2, 1, 140), dtype=dtype) | {
        "rotation": rotation(at[:, None], torch.arange(140), [64, 128, 256]),
        "key_length": at + 1,
        "query_start": at,
    }


def far_apart(dtype):
    """Two queries: more tiers than queries, and some without any."""
    return heads((2, 2, 1, 2, 30), dtype=dtype) | {
        "rotation": rotation(
            torch.tensor([[5, 900], [-4, 2**40]]), torch.arange(30), [1, 10, 100, 800, 1000]
        ),
        "causal": False,
    }


def some_of_the_queries(dtype):
    """Those outside the range may be in any tier."""
    positions = torch.arange(40)
    positions[:6], positions[33:] = 90, 1
    return heads((2, 2, 2, 40, 40), dtype=dtype) | {
        "rotation": rotation(positions, torch.arange(40), [11, 20, 99]),
        "query_range": (torch.tensor([6, 8]), torch.tensor([33, 30])),
    }


def one_tier(dtype):
    """Limits with nothing to limit."""
    return heads((2, 2, 1, 19, 26), dtype=dtype) | {
        "rotation": rotation(torch.arange(7, 26), torch.arange(26), [10])
    }


CASES = (
    crossing, rows_apart, left_padding, window_on_a_cache, one_query, far_apart,
    some_of_the_queries, one_tier,
)  # fmt: skip


def assert_accurate(backend, arguments):
    """Out and lse against float64, judged by the error of plain torch in the dtype."""
    exact = ops.reference.attention(**in_double(arguments), return_lse=True)
    low = ops.reference.attention(**arguments, return_lse=True)
    got = ops.attention(**moved(arguments, backend.device), return_lse=True)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_accuracy(backend, case, dtype):
    assert_accurate(backend, case(dtype))


@pytest.mark.parametrize("seed", range(6))
def test_random_tiers(backend, seed):
    """Any number of rows, heads, tiers, keys, and positions that grow in any steps."""
    generator = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    batch, kv_heads, group, queries = number(1, 4), number(1, 3), number(1, 4), number(1, 40)
    keys, tiers, pairs = queries + number(0, 50), number(1, 6), number(1, 8)
    steps = torch.randint(0, 2 ** number(1, 6), (batch, keys), generator=generator)
    positions = steps.cumsum(-1) + number(-50, 50)
    limits = torch.randint(1, 40, (tiers,), generator=generator).cumsum(-1).tolist()
    by_row = [None, batch][number(0, 2)]
    arguments = heads((batch, kv_heads * group, kv_heads, queries, keys), 2 * pairs + number(0, 5))
    arguments["rotation"] = rotation(
        positions[:, keys - queries :], positions, limits, pairs, by_row,
        interleaved=bool(number(0, 2)),
    )  # fmt: skip
    assert_accurate(backend, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_set_is_rope_and_attention(backend, dtype):
    """Turned queries and keys are rounded as in memory: on CUDA the same bits."""
    arguments = moved(heads((2, 2, 1, 33, 50), 40, dtype), backend.device)
    turn = moved({"rotation": rotation([0], [0], [1], 13, 2)}, backend.device)["rotation"]
    by = {
        "inv_freq": turn.inv_freq[:, 0], "start_tokens": turn.start_tokens[:, 0],
        "base_inv_freq": turn.base_inv_freq, "attention_factor": turn.attention_factor[:, 0],
    }  # fmt: skip
    at = torch.arange(50, device=backend.device) + 2**20
    turned = dict(arguments)
    turned["q"], _ = ops.rope(turned["q"], turned["q"][:, :0], at[17:], **by)
    turned["k"], _ = ops.rope(turned["k"], turned["k"][:, :0], at, **by)
    expected = ops.attention(**turned, return_lse=True)
    got = ops.attention(**arguments, rotation=ops.Rotation(**by, query_positions=at[17:],
                        key_positions=at), return_lse=True)  # fmt: skip
    for a, b in zip(got, expected, strict=True):
        if backend.is_cuda:
            assert torch.equal(a, b)
        else:  # multiplication and addition may be contracted in one and not in the other
            torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cuts", [[13], [20, 21, 22], [40]])
def test_a_prefill_may_be_cut_anywhere(backend, cuts):
    """Each piece attends all keys before it; what a query gets does not depend on the pieces."""
    arguments = moved(crossing(torch.float32), backend.device)
    whole = ops.attention(**arguments)
    turn = arguments["rotation"]
    pieces = []
    for begin, end in zip([0, *cuts], [*cuts, 70], strict=True):
        here = vars(turn) | {
            "query_positions": turn.query_positions[begin:end],
            "key_positions": turn.key_positions[:end],
        }
        q = arguments["q"][:, :, begin:end]
        k, v = (arguments[name][:, :, :end] for name in "kv")
        pieces.append(ops.attention(q, k, v, rotation=ops.Rotation(**here)))
    torch.testing.assert_close(torch.cat(pieces, 2), whole)


def test_rows_do_not_depend_on_each_other(backend):
    arguments = moved(rows_apart(torch.float32), backend.device)
    whole = ops.attention(**arguments)
    turn = arguments["rotation"]
    for b in range(4):
        q, k, v = (arguments[name][b : b + 1] for name in "qkv")
        row = {n: a[b : b + 1] if torch.is_tensor(a) and n != "limits" else a
               for n, a in vars(turn).items()}  # fmt: skip
        alone = ops.attention(
            q, k, v, rotation=ops.Rotation(**row), key_length=int(arguments["key_length"][b])
        )
        torch.testing.assert_close(alone[0], whole[b])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_whose_tiers_fall_is_nan_on_cuda(backend, dtype):
    """Never silently wrong, in the forward and the backward pass; other rows are as they were."""
    arguments = heads((3, 2, 1, 9, 12), dtype=dtype)
    positions = torch.arange(9).repeat(3, 1)
    arguments["rotation"] = rotation(positions, torch.arange(12), [3, 6, 9])
    expected = ops.attention(**moved(arguments, backend.device))
    fallen = positions.clone()
    fallen[1, 7] = 2
    there = moved(arguments, backend.device)
    turn = ops.Rotation(
        **(vars(there["rotation"]) | {"query_positions": fallen.to(backend.device)})
    )
    there["rotation"] = turn
    if not backend.is_cuda:
        with pytest.raises(ValueError, match="got tier 0 after tier 2 in row 1"):
            ops.attention(**there)
        return
    leaves = [there[name].requires_grad_() for name in "qkv"]
    out, lse = ops.attention(**there, return_lse=True)
    assert out[1].isnan().all() and lse[1].isnan().all()
    assert torch.equal(out[[0, 2]], expected[[0, 2]])
    for grad in torch.autograd.grad(out.sum(), leaves):
        assert grad[1].isnan().any() and grad[[0, 2]].isfinite().all()


def leaves_of(arguments):
    """The tensors that have a gradient, as leaves, and the arguments with them."""
    turn = arguments["rotation"]
    leaves = {n: arguments[n] for n in "qkv"}
    leaves |= {n: getattr(turn, n) for n in ("inv_freq", "base_inv_freq", "attention_factor")}
    leaves = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    turned = vars(turn) | {n: t for n, t in leaves.items() if n not in "qkv"}
    return leaves, arguments | leaves_in(leaves) | {"rotation": ops.Rotation(**turned)}


def leaves_in(leaves):
    return {n: leaves[n] for n in "qkv"}


def gradients(function, arguments, weights):
    """A stack, for each leaf, of its gradients by each draw of the weights of out and lse."""
    leaves, arguments = leaves_of(arguments)
    out, lse = function(**arguments, return_lse=True)
    seen = lse != -math.inf
    draws = []
    for to_out, to_lse in weights:
        loss = (out.to(lse.dtype) * to_out.to(lse)).sum()
        loss = loss + (lse.masked_fill(~seen, 0) * to_lse.to(lse)).sum()
        draws.append(torch.autograd.grad(loss, list(leaves.values()), retain_graph=True))
        assert all((grad != 0).any() for grad in draws[-1])
    return {n: torch.stack(each) for n, each in zip(leaves, zip(*draws, strict=True), strict=True)}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", [crossing, rows_near, left_padding, window_on_a_cache,
                                  some_of_the_queries])  # fmt: skip
def test_gradients(backend, case, dtype):
    """Of q, k, v, the frequencies, the base ones and the factors, through out and lse.

    By three draws of the weights: there are three attention factors, and the error of plain torch
    in three numbers alone is small by luck now and then.
    """
    arguments = case(dtype)
    shape = arguments["q"].shape
    weights = [(torch.randn(shape), torch.randn(shape[:3])) for _ in range(3)]
    exact = gradients(ops.reference.attention, in_double(arguments), weights)
    low = gradients(ops.reference.attention, arguments, weights)
    got = gradients(ops.attention, moved(arguments, backend.device), weights)
    for name, expected in exact.items():
        size = expected.abs()
        eps = torch.finfo(dtype).eps  # sums pass through values as large as the largest
        floor = (2 * eps * size + eps * size.max()).flatten()
        # The reference turns, and differentiates the angles, in float64 whatever the dtype.
        factor = 2 if name in "qkv" else 4
        assert_as_accurate(got[name], low[name], expected, factor=factor, floor=floor, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_nobody_sees_may_be_nan(backend, dtype):
    """Also where frequencies have a gradient."""
    arguments = moved(rows_apart(dtype), backend.device) | {"key_start": 3}
    for name in "kv":
        arguments[name][:, :, :3] = math.nan
        arguments[name][3, :, 30:] = math.nan
    leaves, arguments = leaves_of(arguments)
    out = ops.attention(**arguments)
    for grad in torch.autograd.grad(out.float().square().sum(), list(leaves.values())):
        assert grad.isfinite().all() and (grad != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("shape", "limits"),
    [
        ((1, 2, 1, 500, 500), [100, 250, 300, 900]),
        ((2, 4, 2, 130, 2100), [2000, 2001, 2090]),
        ((2, 4, 2, 1, 2100), [1000, 2000, 4000]),
        ((1, 1, 1, 300, 700), [450, 451, 600]),
    ],
)
def test_several_blocks(isa, shape, limits, dtype):
    """Blocks of up to 384 rows, of 256 keys, keys in parts that are merged."""
    batch, *_, queries, keys = shape
    late = torch.arange(batch)[:, None] * 7
    arguments = heads(shape, 36, dtype) | {
        "rotation": rotation(
            late + torch.arange(keys - queries, keys), late + torch.arange(keys), limits
        )
    }
    exact = ops.reference.attention(**in_double(arguments), return_lse=True)
    low = ops.reference.attention(**arguments, return_lse=True)
    got = ops.attention(**arguments, return_lse=True)
    for name, *results in zip(("out", "lse"), got, low, exact, strict=True):
        assert_as_accurate(*results, name=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_number_of_threads_changes_nothing(dtype):
    arguments = heads((2, 4, 2, 200, 2300), 64, dtype) | {
        "rotation": rotation(torch.arange(2100, 2300), torch.arange(2300), [2150, 2250, 9999])
    }
    results = []
    for count in (1, 2, 3):
        with threads(count):
            results.append(ops.attention(**arguments, return_lse=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
