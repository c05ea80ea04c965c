"""ops.rope, ops.rope_ and ops.rerotate against their specification, on every backend."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.criterion import assert_as_accurate, assert_nonzero_gradient
from support.threads import threads

from longrope import RescaleFactors, ops
from longrope.ops.reference.rope import phase_turns

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
#: 2 pi in integers of 300 fractional bits.
TWO_PI = (
    62831853071795864769252867665590057683943387987502116419498891846156328125724179972560696506842341
    * 2**300 // 10**97
)  # fmt: skip
POISON = {torch.float32: 3e38, torch.bfloat16: 3e38, torch.float16: 6e4}


def frequencies(pairs, *rows):
    return torch.rand(*rows, pairs, dtype=torch.float64) + 1e-4


def in_low_precision(x, positions, inv_freq, factor=1.0, interleaved=False):
    """The same maths in the dtype of `x` but for the angles, whose error is judged elsewhere."""
    turns = phase_turns(positions, inv_freq)
    angle = (turns.double() * (2 * math.pi / 2**64)).expand(len(x), -1, -1)
    cos, sin = ((f(angle) * factor).to(x.dtype)[:, None] for f in (torch.cos, torch.sin))
    rotary_dim = 2 * inv_freq.shape[-1]
    first = slice(0, rotary_dim, 2) if interleaved else slice(0, rotary_dim // 2)
    second = slice(1, rotary_dim, 2) if interleaved else slice(rotary_dim // 2, rotary_dim)
    out = x.clone()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., second] * cos + x[..., first] * sin
    return out


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "tokens", "head_dim", "pairs"), [(3, 17, 64, 32), (1, 5, 40, 7)])
def test_accuracy(backend, dtype, heads, tokens, head_dim, pairs, interleaved):
    """Within twice the error of the same maths in the dtype; dimensions past R are copied."""
    q, k = (torch.randn(2, h, tokens, head_dim).to(dtype) for h in (heads, 2))
    positions, inv_freq = torch.randint(-9, 2**22, (2, tokens)), frequencies(pairs, 2)
    exact = ops.reference.rope(q.double(), k.double(), positions, inv_freq, interleaved=interleaved)
    got = ops.rope(
        *(t.to(backend.device) for t in (q, k, positions, inv_freq)), interleaved=interleaved
    )
    for name, x, actual, expected in zip("qk", (q, k), got, exact, strict=True):
        low = in_low_precision(x, positions, inv_freq, interleaved=interleaved)
        assert_as_accurate(actual, low, expected, name=name)
        assert torch.equal(actual[..., 2 * pairs :].cpu(), x[..., 2 * pairs :])


@pytest.mark.parametrize("interleaved", [False, True])
def test_per_row_factors_and_start_tokens(backend, interleaved):
    """Each row has its own frequencies, start tokens and attention factor."""
    q, k = torch.randn(2, 5, 37, 40), torch.randn(2, 37, 2, 40).transpose(1, 2)
    positions = torch.randint(-5, 2**22, (2, 37))
    positions[:, :8] = torch.arange(8)
    arguments = (
        positions, frequencies(12, 2), torch.tensor([3, 0]), frequencies(12),
        torch.tensor([1.1, 0.7], dtype=torch.float64), interleaved,
    )  # fmt: skip
    there = [a.to(backend.device) if torch.is_tensor(a) else a for a in (q, k, *arguments)]
    for got, expected in zip(ops.rope(*there), ops.reference.rope(q, k, *arguments), strict=True):
        torch.testing.assert_close(got.cpu(), expected)


def test_angle_error_far_out(backend):
    """At positions up to 2^22 the angle is off by at most 1e-6 rad; float32 products by 0.1."""
    positions = torch.tensor([2**21, 2**22 - 1, 2**22, 2**21 - 7, -(2**22), 1])
    inv_freq = 10000.0 ** -(torch.arange(64, dtype=torch.float64) / 64)
    ones = torch.zeros(1, 1, len(positions), 128)
    ones[..., :64] = 1  # (1, 0) turns into (cos, sin)
    there = [t.to(backend.device) for t in (ones, ones, positions, inv_freq)]
    turned = ops.rope(*there)[0][0, 0].cpu().double()
    # Exact: integers of 300 fractional bits, reduced by 2 pi in the same.
    for row, position in enumerate(positions.tolist()):
        for i, f in enumerate(inv_freq.tolist()):
            top, bottom = f.as_integer_ratio()
            angle = (position * top * 2**300 // bottom) % TWO_PI / 2**300
            got = math.atan2(turned[row, 64 + i], turned[row, i])
            assert abs(math.remainder(got - angle, 2 * math.pi)) <= 1e-6, (position, i)
    float32_angle = (positions[1].float() * inv_freq.float()).double()
    assert (float32_angle - positions[1] * inv_freq).abs().max() > 0.1


def test_the_bound_on_angles_holds_at_every_position(isa):
    """Of pi 2^-64 |position|: 1e-6 rad up to 2^42, beside float64's own rounding."""
    powers = torch.tensor([2**k for k in (0, 21, 42, 45, 52, 60, 62)] + [2**63 - 1])
    positions = torch.cat([powers, -powers, powers - 1])
    inv_freq = torch.tensor([1.0, 0.7, 10000.0 ** (-1 / 3), 1e-4, 3e-9, 2.5e4], dtype=torch.float64)
    one = torch.zeros(1, 1, len(positions), 12, dtype=torch.float64)
    one[..., :6] = 1
    turned = ops.rope(one, one, positions, inv_freq)[0][0, 0]
    worst = 0.0
    for row, position in enumerate(positions.tolist()):
        bound = math.pi * 2**-64 * abs(position)
        for i, f in enumerate(inv_freq.tolist()):
            top, bottom = f.as_integer_ratio()
            angle = (position * top * 2**300 // bottom) % TWO_PI / 2**300
            error = math.remainder(math.atan2(turned[row, 6 + i], turned[row, i]) - angle, math.tau)
            assert abs(error) <= bound + 1e-15, (position, f)
            worst = max(worst, abs(error) / (bound + 1e-15))
    assert worst > 0.5  # so the bound is what there is
    assert math.pi * 2**-64 * 2**42 < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("first", [0, -40, 2**22 - 21, 2**62 + 5])
def test_a_position_turns_alike_in_every_run(isa, dtype, first):
    """Bit for bit: among its neighbours, out of their order, in pieces and alone."""
    tokens, start = 83, 20
    q = torch.randn(1, 3, tokens, 44).to(dtype)
    positions = torch.arange(first, first + tokens)

    def turned(which):
        return ops.rope(
            q[:, :, which], q[:, :1, which], positions[which],
            inv_freq, torch.tensor([start]), base, 1.25,
        )[0]  # fmt: skip

    inv_freq, base = frequencies(19, 1), frequencies(19, 1)
    whole = turned(torch.arange(tokens))
    shuffled = torch.randperm(tokens)
    assert torch.equal(turned(shuffled), whole[:, :, shuffled])
    for size in (1, 3, 37):
        pieces = [turned(piece) for piece in torch.arange(tokens).split(size)]
        assert torch.equal(torch.cat(pieces, 2), whole)


def test_cosines_of_float16_are_within_a_millionth(isa):
    """Before they are rounded to float16: what is spared there is not seen."""
    tokens, pairs = 200, 64
    one = torch.zeros(1, 1, tokens, 2 * pairs, dtype=torch.float16)
    one[..., :pairs] = 1
    positions, inv_freq = torch.arange(2**20 + 3, 2**20 + 3 + tokens), frequencies(pairs)
    cos, sin = ops.rope(one, one, positions, inv_freq)[0][0, 0].double().split(pairs, -1)
    angle = phase_turns(positions, inv_freq).double() * (2 * math.pi / 2**64)
    for got, exact in ((cos, angle.cos()), (sin, angle.sin())):
        half_a_unit = 2.0 ** (torch.frexp(exact).exponent.clamp(min=-13) - 12)
        assert ((got - exact).abs() <= half_a_unit + 4e-7).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("token_major", [False, True])
def test_strided_views_of_poisoned_memory(backend, dtype, token_major):
    """Nothing outside the views is read or, in place, written."""
    big = torch.full((2, 9, 7, 96), POISON[dtype], dtype=dtype, device=backend.device)
    big[:, 1::2, ::2, 8:72] = torch.randn(2, 4, 4, 64).to(dtype)
    view = big[:, 1::2, ::2, 8:72]
    view = view.transpose(1, 2) if token_major else view
    positions = torch.arange(4, device=backend.device).expand(2, 4) + 1000
    inv_freq = frequencies(32).to(backend.device)
    plain = view.cpu().contiguous()
    expected = ops.reference.rope(plain, plain, positions.cpu(), inv_freq.cpu())[0]
    before = big.clone()
    for got in ops.rope(view, view, positions, inv_freq):
        low = in_low_precision(plain, positions.cpu(), inv_freq.cpu())
        exact = ops.reference.rope(plain.double(), plain.double(), positions.cpu(), inv_freq.cpu())
        assert_as_accurate(got, low, exact[0])
    assert torch.equal(big, before)
    other = view.clone()
    ops.rope_(view, other, positions, inv_freq)
    assert torch.equal(view.cpu(), other.cpu())
    torch.testing.assert_close(view.cpu(), expected)
    restored = big.clone()
    restored[:, 1::2, ::2, 8:72] = before[:, 1::2, ::2, 8:72]
    assert torch.equal(restored, before)


@pytest.mark.parametrize("token_major", [False, True])
@pytest.mark.parametrize(
    ("dtype", "head_dim", "pairs"),
    [(torch.float32, 128, 48), (torch.bfloat16, 128, 64), (torch.bfloat16, 96, 48)],
)
def test_results_larger_than_a_cache(isa, dtype, head_dim, pairs, token_major):
    """Large results are written past the caches: the same bits as in place, which are not."""
    tokens = 2**22 // (torch.finfo(dtype).bits // 8) // head_dim + 1  # 32 MiB of 8 heads
    q, k = (torch.randn(1, heads, tokens, head_dim).to(dtype) for heads in (8, 1))
    if token_major:
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    turned_by = torch.arange(tokens), frequencies(pairs)
    results = ops.rope(q, k, *turned_by)
    for result, in_place in zip(results, ops.rope_(q, k, *turned_by), strict=True):
        assert torch.equal(result, in_place)


def test_not_finite_values_stay_in_their_pair(backend):
    q = torch.randn(1, 1, 3, 16)
    q[0, 0, 0, 2], q[0, 0, 1, 5], q[0, 0, 2, 15] = math.nan, math.inf, -math.inf
    positions, inv_freq = torch.arange(3), frequencies(6)
    expected = ops.reference.rope(q, q, positions, inv_freq)[0]
    got = ops.rope(*(t.to(backend.device) for t in (q, q, positions, inv_freq)))[0].cpu()
    assert torch.equal(got.isnan(), expected.isnan())
    assert torch.equal(got[~got.isnan()].isinf(), expected[~expected.isnan()].isinf())
    assert got.isfinite().sum() == q.numel() - 6 + 1  # both of each pair; 15 is not turned


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("head_dim", [16, 64])
def test_every_bfloat16(isa, head_dim, interleaved):
    """Every bit pattern: finite where the reference is, and rounded once after float32."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    q, inv_freq = every.view(1, 1, -1, head_dim), frequencies(head_dim // 2)
    positions = torch.arange(q.shape[2])
    got = ops.rope(q, q, positions, inv_freq, interleaved=interleaved)[0]
    turned_by = positions, inv_freq, 0, None, 1.0, interleaved
    exact = ops.reference.rope(q.double(), q.double(), *turned_by)[0]
    expected = exact.to(q.dtype)
    assert torch.equal(got.isnan(), expected.isnan())
    finite = expected.isfinite()
    torch.testing.assert_close(got[~finite], expected[~finite], equal_nan=True)
    terms = q.double().abs().unflatten(-1, (-1, 2) if interleaved else (2, -1))
    of_pair = terms.sum(-1 if interleaved else -2, keepdim=True).expand_as(terms).flatten(-2)
    limit = 2**-7.99 * exact.abs() + 2**-22 * of_pair + 2**-134  # the least step is 2**-133
    assert ((got.double() - exact).abs() <= limit)[finite].all()


def test_gradients(backend):
    """Of q, k, the frequencies of each row and the attention factor."""

    def gradients(function, device):
        torch.manual_seed(1)
        q, k = torch.randn(2, 3, 21, 32), torch.randn(2, 1, 21, 32)
        inv_freq, base = frequencies(13, 2), frequencies(13)
        factor = torch.tensor([1.1, 0.9], dtype=torch.float64)
        leaves = [t.to(device).requires_grad_() for t in (q, k, inv_freq, base, factor)]
        q, k, inv_freq, base, factor = leaves
        positions = (torch.arange(21) + 100).to(device)
        outs = function(
            q, k, positions, inv_freq, torch.tensor([110, 0], device=device), base, factor
        )
        torch.manual_seed(2)
        loss = sum((o * torch.randn(o.shape).to(device)).sum() for o in outs)
        loss.backward()
        assert_nonzero_gradient(*leaves)
        return [t.grad.cpu() for t in leaves]

    got, expected = gradients(ops.rope, backend.device), gradients(ops.reference.rope, "cpu")
    for actual, right in zip(got, expected, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-5, atol=1e-4)


def test_gradient_is_the_same_for_any_number_of_threads():
    """The sums over tokens are added in one order."""
    q, inv_freq = torch.randn(1, 2, 3000, 16), frequencies(8).requires_grad_()
    results = []
    for count in (1, 2, 3):
        with threads(count):
            out = ops.rope(q, q, torch.arange(3000), inv_freq)[0]
            results.append(torch.autograd.grad(out.square().mul(q).sum(), inv_freq)[0])
    assert all(torch.equal(results[0], r) for r in results[1:])


def test_outputs_keep_the_memory_order_of_the_inputs(backend):
    q = torch.randn(2, 5, 3, 8, device=backend.device)
    positions, inv_freq = torch.arange(3).to(backend.device), frequencies(4).to(backend.device)
    token_major = q.transpose(1, 2).contiguous().transpose(1, 2)
    for x in (q, token_major):
        assert ops.rope(x, x, positions, inv_freq)[0].stride() == x.stride()


@pytest.mark.parametrize("shape", [(0, 2, 3, 8), (2, 0, 3, 8), (2, 2, 0, 8)])
def test_empty(backend, shape):
    q = torch.randn(shape, device=backend.device)
    k = torch.randn(shape[0], 1, *shape[2:], device=backend.device)
    positions, inv_freq = torch.arange(shape[2]), frequencies(4)
    got = ops.rope(q, k, positions.to(backend.device), inv_freq.to(backend.device))
    assert [t.shape for t in got] == [q.shape, k.shape]


def factor_pair(rotary_dim):
    common = {
        "original_length": 64, "target_length": 512, "rope_theta": 1e4, "rotary_dim": rotary_dim
    }  # fmt: skip
    steps = torch.linspace(1, 8, rotary_dim // 2, dtype=torch.float64).tolist()
    return (
        RescaleFactors(steps, start_tokens=4, attention_factor=1.2, **common),
        RescaleFactors.pi(**common),
    )


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rerotate_equals_rotating_afresh(backend, dtype, interleaved):
    """Keys rotated under one set become keys rotated under the other, rounded once more."""
    keys, positions = torch.randn(2, 3, 19, 24).to(dtype), torch.randint(0, 2**21, (2, 19))
    positions[0, :4] = torch.arange(4)
    for sets in (factor_pair(16), factor_pair(16)[::-1]):
        there = keys.to(backend.device), positions.to(backend.device)
        got = ops.rerotate(*there, *sets, interleaved)
        exact = ops.reference.rerotate(keys.double(), positions, *sets, interleaved)
        low = exact.to(dtype)
        assert_as_accurate(got, low, exact)
        in_place = there[0].clone()
        assert ops.rerotate(in_place, there[1], *sets, interleaved, out=in_place) is in_place
        out = torch.full_like(there[0], math.nan)
        ops.rerotate(*there, *sets, interleaved, out=out)
        assert torch.equal(in_place, got) and torch.equal(out, got)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 20), st.integers(0, 9), st.booleans(),
    st.integers(-(2**40), 2**40),
)  # fmt: skip
def test_properties(heads, tokens, pairs, rest, interleaved, offset):
    """Norms are kept; turning back is the identity; scores depend on distances alone."""
    q, k = (torch.randn(1, heads, tokens, 2 * pairs + rest, dtype=torch.float64) for _ in "qk")
    positions, inv_freq = torch.randint(-1000, 1000, (tokens,)), frequencies(pairs)
    turned = ops.rope(q, k, positions, inv_freq, interleaved=interleaved)
    torch.testing.assert_close(turned[0].norm(dim=-1), q.norm(dim=-1))
    back = ops.rope(*turned, -positions, inv_freq, interleaved=interleaved)
    torch.testing.assert_close(back, (q, k))
    moved = ops.rope(q, k, positions + offset, inv_freq, interleaved=interleaved)
    torch.testing.assert_close(
        moved[0] @ moved[1].transpose(2, 3), turned[0] @ turned[1].transpose(2, 3)
    )


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 30), st.sampled_from([8, 16, 32]), st.booleans())
def test_rerotate_there_and_back_is_the_identity(tokens, rotary_dim, interleaved):
    keys, positions = torch.randn(2, 2, tokens, 40, dtype=torch.float64), torch.arange(tokens)
    a, b = factor_pair(rotary_dim)
    there = ops.rerotate(keys, positions, a, b, interleaved)
    torch.testing.assert_close(ops.rerotate(there, positions, b, a, interleaved), keys)
