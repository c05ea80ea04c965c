"""Arguments at random for attention, its gradient and merging: right, or one sentence, no crash."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longrope import ops

pytestmark = pytest.mark.usefixtures("one_thread")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ODD_DTYPES = [torch.int64, torch.bool, torch.complex64, torch.float8_e4m3fn]
ODD_NUMBERS = [0, 1, -1, 2, 7, 2**31, 2**62, -(2**62), 2**63 - 1, -(2**63)]
ODD_FLOATS = [0.0, -0.5, 1e-30, math.inf, -math.inf, math.nan]


class Arguments:
    """Draws arguments that mostly fit together, and now and then do not."""

    def __init__(self, seed, mistakes=0.02):
        self.random = random.Random(seed)
        self.mistakes = mistakes
        self.batch, self.kv_heads = self.random.choice([1, 1, 2, 0]), self.random.choice([1, 2, 0])
        self.heads = self.kv_heads * self.random.choice([1, 2, 3])
        self.queries, self.keys = (self.random.choice([0, 1, 2, 5, 33]) for _ in range(2))
        self.head_dim = self.random.choice([1, 2, 8, 33])
        self.dtype = self.random.choice(DTYPES)

    def slips(self):
        return self.random.random() < self.mistakes

    def tensor(self, *shape, dtype=None, strided=True):
        """Random values of this shape, strides and storage as they come."""
        shape = list(shape)
        if self.slips():
            axis = self.random.randrange(len(shape))
            change = self.random.choice(["drop", "grow", "add", "one"])
            if change == "drop":
                del shape[axis]
            elif change == "add":
                shape.insert(axis, 1)
            else:
                shape[axis] = 1 if change == "one" else shape[axis] + 1
        dtype = self.random.choice(ODD_DTYPES) if self.slips() else dtype or self.dtype
        layout = self.random.choice(["plain", "padded", "turned", "shared"]) if strided else ""
        if layout == "padded":
            wide = torch.randn([n + 3 for n in shape])
            value = wide[tuple(slice(1, 1 + n) for n in shape)]
        elif layout == "turned" and len(shape) > 2:
            value = torch.randn([shape[0], shape[2], shape[1], *shape[3:]]).transpose(1, 2)
        elif layout == "shared" and len(shape) > 2:
            value = torch.randn([1, *shape[1:]]).expand(shape)
        else:
            value = torch.randn(shape)
        if dtype != torch.float32:
            wide = value.to(dtype)
            value = wide if self.random.random() < 0.5 else torch.empty_like(wide).copy_(wide)
        if self.slips():
            value = value[..., ::2]
        return value.to("meta") if self.slips() and self.slips() else value

    def bound(self, low, high, default):
        """A bound as the binding takes it: for all rows, or by row."""
        if self.slips():
            return self.random.choice(ODD_NUMBERS), None
        if self.random.random() < 0.5:
            return default, None
        rows = torch.randint(low, high + 1, (self.batch,))
        return 0, self.tensor(self.batch, dtype=torch.int64) if self.slips() else rows

    def options(self):
        bounds = [
            *self.bound(-5, self.keys + 5, self.keys - self.queries),
            *self.bound(0, self.keys // 2, 0),
            *self.bound(self.keys // 2, self.keys, self.keys),
            *self.bound(-3, self.queries, 0),
            *self.bound(0, self.queries + 3, self.queries),
        ]
        window = self.random.choice(ODD_NUMBERS if self.slips() else [0, 0, 1, 4, 2**62])
        scale = self.random.choice(ODD_FLOATS if self.slips() else [0.3, 1.0, -1.0, 0.0])
        softcap = self.random.choice(ODD_FLOATS if self.slips() else [0.0, 0.0, 2.0])
        return (self.random.random() < 0.7, *bounds, window, scale, softcap)

    def heads_of(self, heads, tokens):
        return self.tensor(self.batch, heads, tokens, self.head_dim)

    def qkv(self):
        return (
            self.heads_of(self.heads, self.queries), self.heads_of(self.kv_heads, self.keys),
            self.heads_of(self.kv_heads, self.keys),
        )  # fmt: skip

    def lse(self):
        dtype = torch.float64 if self.dtype == torch.float64 else torch.float32
        return self.tensor(self.batch, self.heads, self.queries, dtype=dtype)

    def rotation(self):
        """What follows the options of attention_rotated."""
        rows = self.random.choice([(), (self.batch,)])
        tiers, pairs = self.random.choice([1, 1, 2, 4]), self.random.choice([1, 1, 2, 4])
        double = {"dtype": torch.float64}
        limits = self.random.sample(ODD_NUMBERS if self.slips() else range(1, 30), tiers)
        fall = self.slips()
        return (
            *(self.positions(n, fall) for n in (self.queries, self.keys)),
            None if tiers == 1 else torch.tensor(limits if fall else sorted(limits)),
            self.tensor(*rows, tiers, pairs, **double),
            None if self.slips() else self.tensor(*rows, pairs, **double),
            self.random.choice([0, 0, 3, -1 if self.slips() else 7]),
            self.random.choice([None, torch.randint(0, 5, (*rows, tiers))]),
            self.random.choice(ODD_FLOATS if self.slips() else [1.0, 1.3]),
            self.random.choice([None, self.tensor(*rows, tiers, **double)]),
            self.random.random() < 0.5,
        )

    def positions(self, tokens, fall):
        rows = self.random.choice([(), (self.batch,)])
        positions = torch.randint(0, 40, (*rows, tokens))
        return positions if fall else positions.sort(-1).values


def call(function, *arguments):
    """Return what it returns, or None where it refuses in one sentence."""
    try:
        return function(*arguments)
    except ValueError as error:
        sentence = str(error).split("Exception raised from")[0].strip()
        assert ": " in sentence and "\n" not in sentence
    except NotImplementedError:  # torch's own refusal: no kernel for tensors without data
        assert any(torch.is_tensor(a) and a.is_meta for a in arguments)
    return None


@pytest.mark.parametrize("seed", range(4))
def test_attention(isa, seed):
    accepted = refused = 0
    for i in range(150):
        draw = Arguments(1000 * seed + i)
        q, k, v = draw.qkv()
        op = torch.ops.longrope.attention
        turned_by = ()
        if i % 2:
            op, turned_by = torch.ops.longrope.attention_rotated, draw.rotation()
        got = call(op, q, k, v, *draw.options(), *turned_by)
        refused += got is None
        if got is None or q.is_meta or k.is_meta or v.is_meta:
            continue
        accepted += 1
        out, lse = got
        assert out.shape == q.shape and out.dtype == q.dtype and lse.shape == q.shape[:3]
        assert out.isfinite().all() and not lse.isnan().any() and (lse != math.inf).all()
        assert ((out == 0).all(-1) | (lse != -math.inf)).all()
    assert accepted > 20 and refused > 20


@pytest.mark.parametrize("seed", range(3))
def test_attention_backward(isa, seed):
    accepted = refused = 0
    for i in range(120):
        draw = Arguments(1000 * seed + i, mistakes=0.01)
        q, k, v = draw.qkv()
        out, grad_out = (draw.heads_of(draw.heads, draw.queries) for _ in range(2))
        grad_lse = None if i % 3 else draw.lse()
        got = call(
            torch.ops.longrope.attention_backward, grad_out, grad_lse, q, k, v, out, draw.lse(),
            *draw.options(),
        )  # fmt: skip
        refused += got is None
        if got is None or any(t.is_meta for t in (q, k, v, out, grad_out)):
            continue
        accepted += 1
        for grad, of in zip(got, (q, k, v), strict=True):
            assert grad.shape == of.shape and grad.dtype == of.dtype
    assert accepted > 20 and refused > 20


@pytest.mark.parametrize("seed", range(2))
def test_merge_attention(isa, seed):
    accepted = refused = 0
    for i in range(150):
        draw = Arguments(1000 * seed + i, mistakes=0.04)
        out_a, out_b = (draw.heads_of(draw.heads, draw.queries) for _ in range(2))
        lse_a, lse_b = draw.lse(), draw.lse()
        got = call(ops.merge_attention, out_a, lse_a, out_b, lse_b)
        refused += got is None
        if got is None or out_a.is_meta:
            continue
        accepted += 1
        expected = ops.reference.merge_attention(
            out_a.double(), lse_a.double(), out_b.double(), lse_b.double()
        )
        torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-5, atol=1e-5)
    assert accepted > 20 and refused > 20
