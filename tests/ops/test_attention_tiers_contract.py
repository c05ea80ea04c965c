"""Tiers inside ops.attention under autograd, torch.compile, and with wrong inputs."""

from __future__ import annotations

import math

import pytest
import torch

from longrope import ops

pytestmark = pytest.mark.usefixtures("one_thread")

OP = torch.ops.longrope.attention_rotated
LIMITS = torch.tensor([3, 6, 20])


def problem(dtype=torch.float64, queries=7, keys=9, head_dim=6):
    """q, k, v of two rows, four query heads and two key heads."""
    shapes = ((4, queries), (2, keys), (2, keys))
    return [torch.randn(2, h, n, head_dim).to(dtype) for h, n in shapes]


def rotation(queries=7, keys=9, by_row=False, **changes):
    """Three tiers of two frequencies, crossed in the middle of the queries."""
    rows = (2,) if by_row else ()
    arguments = {
        "inv_freq": torch.rand(*rows, 3, 2).double(),
        "query_positions": torch.arange(queries) + keys - queries,
        "key_positions": torch.arange(keys),
        "limits": LIMITS,
        "start_tokens": torch.tensor([0, 4, 2]).expand(*rows, 3),
        "base_inv_freq": torch.rand(*rows, 2).double(),
        "attention_factor": torch.rand(*rows, 3).double() + 0.5,
    }
    return ops.Rotation(**(arguments | changes))


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"window": 4, "softcap": 1.5},
        {"key_start": torch.tensor([0, 2]), "key_length": torch.tensor([9, 7])},
        {"query_range": (torch.tensor([0, 1]), 6)},
    ],
    ids=str,
)
def test_gradcheck(isa, arguments, by_row):
    """Derivatives of out and lse in everything that has one, against differences in float64."""
    turn = rotation(by_row=by_row)
    leaves = [*problem(), turn.inv_freq, turn.base_inv_freq, turn.attention_factor]

    def call(q, k, v, inv_freq, base, factor):
        here = vars(turn) | {
            "inv_freq": inv_freq, "base_inv_freq": base, "attention_factor": factor
        }  # fmt: skip
        out, lse = ops.attention(
            q, k, v, **arguments, rotation=ops.Rotation(**here), return_lse=True
        )
        return out, lse.masked_fill(lse == -math.inf, 0)

    assert torch.autograd.gradcheck(call, [t.requires_grad_() for t in leaves])


def test_shared_factor_and_single_leaves():
    """A factor `[]` for all tiers; gradients only of what asks for one."""
    q, k, v = problem()
    turn = vars(rotation())
    factor = torch.tensor(1.2, dtype=torch.float64, requires_grad=True)

    def call(factor, v):
        return ops.attention(q, k, v, rotation=ops.Rotation(**turn | {"attention_factor": factor}))

    assert torch.autograd.gradcheck(call, (factor, v.requires_grad_()))


def test_no_second_derivative():
    leaves = [t.requires_grad_() for t in problem()]
    out = ops.attention(*leaves, rotation=rotation())
    (first, *_) = torch.autograd.grad(out.sum(), leaves, create_graph=True)
    with pytest.raises(NotImplementedError, match="attention: no second derivative"):
        first.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("limits", [LIMITS, None])
def test_opcheck(dtype, limits):
    """Schemas, fake kernels and autograd registrations are what torch.compile expects."""
    q, k, v = problem(dtype)
    bounds = (0, torch.tensor([2, 0]), 0, torch.tensor([0, 2]), 9, None, 0, None, 7, None)
    turn = rotation()
    tiers = slice(None if limits is not None else 1)
    q.requires_grad_(), turn.inv_freq.requires_grad_()
    arguments = (
        q, k, v, True, *bounds, 0, 0.5, 2.0, turn.query_positions, turn.key_positions, limits,
        turn.inv_freq[tiers].detach().requires_grad_(), turn.base_inv_freq, 0,
        turn.start_tokens[tiers], 1.0, turn.attention_factor[tiers], False,
    )  # fmt: skip
    torch.library.opcheck(OP, arguments)


def test_crossing_a_limit_does_not_recompile():
    """One graph without breaks: a static cache decodes, whatever tiers its rows are in."""
    q, k, v = problem(torch.float32, queries=1, keys=12)
    sets = vars(rotation(1, 12))

    def step(q, k, v, at):
        here = sets | {"query_positions": at[:, None], "key_positions": torch.arange(12)}
        return ops.attention(
            q, k, v, query_start=at, key_length=at + 1, rotation=ops.Rotation(**here)
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True), torch.no_grad():
        for at in ([0, 2], [1, 3], [2, 6], [5, 11], [3, 0]):
            at = torch.tensor(at)
            torch.testing.assert_close(compiled(q, k, v, at), step(q, k, v, at))


def test_compile_with_gradients():
    """One graph, forward and backward, also where lengths change."""

    def loss(q, k, v, turn):
        out, lse = ops.attention(q, k, v, rotation=turn, return_lse=True)
        return out.square().sum() + lse.square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for queries, keys in ((2, 6), (5, 9), (8, 12)):
        leaves = [t.requires_grad_() for t in problem(torch.float32, queries, keys)]
        turn = rotation(queries, keys)
        leaves += [turn.inv_freq.requires_grad_(), turn.attention_factor.requires_grad_()]
        got = torch.autograd.grad(compiled(*leaves[:3], turn), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*leaves[:3], turn), leaves))


def wrong_rotations():
    yield {"limits": [3, 6, 20]}, r"limits: expected int64 \[T\], got \[3, 6, 20\]"
    yield {"limits": LIMITS.int()}, r"limits: expected int64 \[T\], got int32 \[3\]"
    yield {"limits": LIMITS[None]}, r"limits: expected int64 \[T\], got int64 \[1, 3\]"
    yield {"limits": LIMITS[:0]}, r"limits: expected int64 \[T\], got int64 \[0\]"
    yield {"limits": LIMITS[:2]}, r"inv_freq: expected float64 \[2, R/2\] or \[B, 2, R/2\], got f"
    yield {"limits": None}, r"start_tokens: .*|attention_factor: .*|inv_freq: .*"
    yield {"inv_freq": torch.rand(2).double()}, r"inv_freq: expected float64 \[3, R/2\] or \[B, 3"
    yield {"inv_freq": torch.rand(3, 2)}, r"inv_freq: expected float64 .*, got float32 \[3, 2\]"
    starts = torch.zeros(2, dtype=torch.int64)
    yield {"start_tokens": starts}, r"start_tokens: expected an int or int64 \[3\] or \[B, 3\], got"
    yield {"start_tokens": -1}, r"start_tokens: expected 0 or more, got -1"
    yield {"base_inv_freq": None}, r"base_inv_freq: required with start_tokens"
    base = torch.rand(3).double()
    yield {"base_inv_freq": base}, r"base_inv_freq: expected float64 \[2\] or \[B, 2\], got"
    factors = r"attention_factor: expected a number, or a float tensor \[\], \[3\] or \[B, 3\], got"
    yield {"attention_factor": torch.rand(2)}, factors
    yield {"attention_factor": math.inf}, r"attention_factor: expected a finite number"


@pytest.mark.parametrize(("change", "message"), list(wrong_rotations()))
def test_wrong_rotations(change, message):
    """Each gets one sentence that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        turn = rotation(**change)
        ops.attention(*problem(), rotation=turn)
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()


def wrong_values():
    yield {"limits": torch.tensor([3, 3, 9])}, r"limits: expected growing positions, got 3 after 3"
    yield {"limits": torch.tensor([3, 9, 6])}, r"limits: expected growing positions, got 6 after 9"
    falling = torch.tensor([[0, 1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8, 9, 2]])
    message = r"query_positions: expected tiers that do not fall along a row, got tier 0 after tier"
    yield {"query_positions": falling}, message + " 2 in row 1"
    yield {"query_positions": torch.arange(6)}, r"query_positions: expected int64 \[7\] or \[2, 7\]"
    yield {"key_positions": torch.arange(8)}, r"key_positions: expected int64 \[9\] or \[2, 9\]"
    flat = torch.rand(2, 3, 2).double()
    yield {"inv_freq": flat[:1]}, r"inv_freq: expected float64 \[3, 2\] or \[2, 3, 2\], got"
    yield {"inv_freq": flat / 0}, r"inv_freq: expected finite frequencies, got infinity"
    yield (
        {"inv_freq": torch.rand(3, 4).double(), "base_inv_freq": torch.rand(4).double()},
        (r"inv_freq: expected 1 to 3 frequencies for head_dim 6, got 4"),
    )
    starts = torch.ones(3, 3).long()
    yield {"start_tokens": starts}, r"start_tokens: expected int64 \[3\] or \[2, 3\], got"
    yield {"start_tokens": -starts[0]}, r"start_tokens: expected 0 or more, got -1"
    yield {"attention_factor": flat[0, :, 0] / 0}, r"attention_factor: expected finite numbers"
    yield {"limits": LIMITS.to("meta")}, r"limits: expected device cpu, got meta"


@pytest.mark.parametrize(("change", "message"), list(wrong_values()))
def test_wrong_values(change, message):
    """What only shows beside q and k, or in the numbers."""
    turn = rotation(**change)
    with pytest.raises(ValueError, match=message) as error:
        ops.attention(*problem(), rotation=turn)
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()


def test_the_reference_refuses_the_same_values():
    for change in ({"limits": torch.tensor([3, 3, 9])},
                   {"query_positions": torch.arange(7).flip(0)}):  # fmt: skip
        with pytest.raises(ValueError, match=r"expected (growing|tiers that do not fall)"):
            ops.reference.attention(*problem(), rotation=rotation(**change))


def test_tiers_that_fall_outside_the_range_are_fine():
    positions = torch.tensor([9, 0, 1, 4, 7, 8, 0])
    out = ops.attention(
        *problem(), rotation=rotation(query_positions=positions), query_range=(1, 6)
    )
    assert (out[:, :, [0, 6]] == 0).all() and (out[:, :, 1:6] != 0).all()
