"""ops.rerotate_rows_: rows of a cache that change their tier, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from support.criterion import assert_as_accurate

from longrope import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]

#: From no rotation, to none, up, down, and rows that stay.
FROM = torch.tensor([-1, 2, 0, 1, -1, 2])
TO = torch.tensor([1, -1, 2, 0, -1, 2])


def problem(dtype=torch.float64, by_row=True, tokens=19, head_dim=24, pairs=7):
    """Six rows of keys, three tiers."""
    rows = (6,) if by_row else ()
    positions = torch.randint(-5, 2**21, (*rows, tokens))
    positions[..., :6] = torch.arange(6)
    return {
        "k": torch.randn(6, 3, tokens, head_dim).to(dtype),
        "positions": positions,
        "from_tier": FROM,
        "to_tier": TO,
        "inv_freq": torch.rand(*rows, 3, pairs, dtype=torch.float64),
        "start_tokens": torch.randint(0, 7, (*rows, 3)) if by_row else 4,
        "base_inv_freq": torch.rand(*rows, pairs, dtype=torch.float64),
        "attention_factor": torch.rand(*rows, 3, dtype=torch.float64) + 0.5 if by_row else 1.3,
    }


def to(device, arguments):
    return {n: a.to(device) if torch.is_tensor(a) else a for n, a in arguments.items()}


@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_change_turn_and_others_stay(backend, dtype, interleaved, by_row):
    """Rounded once more than exact; rows that stay keep every bit, NaN too."""
    arguments = problem(dtype, by_row)
    keys = arguments["k"]
    keys[4:, 0, 3, 1] = math.nan
    exact = ops.reference.rerotate_rows_(
        **(arguments | {"k": keys.double()}), interleaved=interleaved
    )
    there = to(backend.device, arguments)
    there["k"] = keys.clone().to(backend.device)
    assert ops.rerotate_rows_(**there, interleaved=interleaved) is there["k"]
    got = there["k"].cpu()
    assert_as_accurate(got[:4], exact[:4].to(dtype), exact[:4])
    assert torch.equal(got[4:].view(torch.uint8), keys[4:].view(torch.uint8))
    assert torch.equal(got[..., 14:].nan_to_num(), keys[..., 14:].nan_to_num())


@pytest.mark.parametrize(("dtype", "head_dim", "pairs"), [(torch.bfloat16, 64, 32),
                                                          (torch.float32, 128, 64)])  # fmt: skip
def test_from_no_rotation_is_rope(backend, dtype, head_dim, pairs):
    """Bit for bit, each row under its own tier."""
    keys = torch.randn(3, 2, 70, head_dim).to(dtype).to(backend.device)
    tier = torch.tensor([2, 0, 1], device=backend.device)
    inv_freq = torch.rand(3, pairs, dtype=torch.float64).to(backend.device)
    factor = torch.tensor([1.0, 1.2, 0.7], dtype=torch.float64).to(backend.device)
    positions = (torch.arange(70) + 2**20).to(backend.device)
    expected, _ = ops.rope(
        keys, keys[:, :0], positions, inv_freq[tier], attention_factor=factor[tier]
    )
    got = ops.rerotate_rows_(
        keys.clone(), positions, torch.full_like(tier, -1), tier, inv_freq, attention_factor=factor
    )
    assert torch.equal(got, expected)


def test_there_and_back_is_the_identity(isa):
    arguments = problem()
    keys = arguments.pop("k")
    there = ops.rerotate_rows_(keys.clone(), **arguments)
    back = arguments | {"from_tier": TO, "to_tier": FROM}
    torch.testing.assert_close(ops.rerotate_rows_(there, **back), keys)


def test_views_of_poisoned_memory(backend):
    """Nothing outside the view is written."""
    arguments = to(backend.device, problem(torch.float32))
    big = torch.full((6, 7, 25, 40), 3e38, device=backend.device)
    view = big[:, 1:4, 2:21, 8:32]
    view.copy_(arguments["k"])
    expected = ops.rerotate_rows_(**(arguments | {"k": view.clone()}))
    ops.rerotate_rows_(**(arguments | {"k": view}))
    assert torch.equal(view, expected)
    view.fill_(3e38)
    assert (big == 3e38).all()


def test_unknown_tiers_become_nan(backend):
    """On CUDA, where looking would wait for the device; nothing out of bounds is read."""
    if not backend.is_cuda:
        pytest.skip("refused on the CPU")
    arguments = to(backend.device, problem(torch.float32))
    expected = ops.rerotate_rows_(**(arguments | {"k": arguments["k"].clone()}))
    arguments["from_tier"] = torch.tensor([3, 2, 0, 2**40, -1, 2], device=backend.device)
    got = ops.rerotate_rows_(**arguments)
    assert got[[0, 3], :, :, :14].isnan().all() and got[[0, 3], :, :, 14:].isfinite().all()
    for row in (1, 2, 4, 5):
        assert torch.equal(got[row], expected[row])


def test_opcheck():
    arguments = list(problem(torch.float32).values())
    k, positions, one, other, inv_freq, starts, base, factors = arguments
    torch.library.opcheck(
        torch.ops.longrope.rerotate_rows_,
        (k, positions, one, other, inv_freq, base, 0, starts, 1.0, factors, False),
    )


def test_compile():
    """One graph, whichever rows change."""

    def turn(k, one, other, rest):
        ops.rerotate_rows_(k, rest["positions"], one, other, rest["inv_freq"])
        return k + 1

    arguments = problem(torch.float32)
    compiled = torch.compile(turn, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for one, other in ((FROM, TO), (TO, FROM), (FROM, FROM.clone())):
            keys, expected = arguments["k"].clone(), arguments["k"].clone()
            got = compiled(keys, one, other, arguments)
            assert torch.equal(got, turn(expected, one, other, arguments))
            assert torch.equal(keys, expected)


def wrong_inputs():
    yield {"k": torch.randn(3, 19, 24)}, r"k: expected \[B, heads, N, D\]"
    yield {"k": torch.randn(1, 3, 19, 24).expand(6, 3, 19, 24)}, r"k: expected memory without over"
    yield {"k": torch.randn(6, 3, 19, 24, requires_grad=True)}, r"rerotate_rows_: writes in place"
    yield {"positions": torch.arange(18)}, r"positions: expected int64 \[19\] or \[6, 19\], got"
    yield {"from_tier": TO[:5]}, r"from_tier: expected int64 \[6\], got int64 \[5\]"
    yield {"to_tier": TO.int()}, r"to_tier: expected int64 \[6\], got int32 \[6\]"
    yield {"to_tier": [0, 1]}, r"to_tier: expected a tensor"
    yield {"to_tier": TO + 1}, r"to_tier: expected -1 \(not rotated\) to 2, got 3"
    yield {"from_tier": FROM - 1}, r"from_tier: expected -1 \(not rotated\) to 2, got -2"
    flat = torch.rand(7).double()
    yield (
        {"inv_freq": flat},
        r"inv_freq: expected float64 \[0, 7\] or \[6, 0, 7\], got|at least one",
    )
    yield {"inv_freq": flat.expand(5, 3, 7)}, r"inv_freq: expected float64 \[3, 7\] or \[6, 3, 7\]"
    yield {"inv_freq": flat.expand(6, 3, 7).float()}, r"inv_freq: expected .*got float32"
    yield {"inv_freq": flat.expand(6, 3, 7) / 0}, r"inv_freq: expected finite frequencies"
    yield {"inv_freq": torch.rand(3, 13).double()}, r"inv_freq: expected 1 to 12 frequencies"
    yield {"start_tokens": torch.ones(2).long()}, r"start_tokens: expected int64 \[3\] or \[6, 3\]"
    yield {"start_tokens": -torch.ones(3).long()}, r"start_tokens: expected 0 or more, got -1"
    yield {"base_inv_freq": None}, r"base_inv_freq: required with start_tokens"
    yield {"base_inv_freq": flat[:6]}, r"base_inv_freq: expected float64 \[7\] or \[6, 7\]"
    yield {"attention_factor": flat[:2]}, r"attention_factor: expected float64 \[3\] or \[6, 3\]"
    yield {"attention_factor": math.nan}, r"attention_factor: expected a finite number"
    yield {"attention_factor": flat[:3] / 0}, r"attention_factor: expected finite numbers"
    yield {"interleaved": 1}, r"interleaved: expected a bool"


@pytest.mark.parametrize(("change", "message"), list(wrong_inputs()))
def test_wrong_inputs(change, message):
    """Each gets one sentence that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        ops.rerotate_rows_(**(problem(torch.float32) | change))
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()
