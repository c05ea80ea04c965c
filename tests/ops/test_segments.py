"""Attention of segments that turn each its own way: values and gradients, on every backend."""

from __future__ import annotations

import pytest
import torch
from support.criterion import assert_as_accurate, gradient_floor

from longrope import ops
from longrope.ops._segments import Segment, attend_segments

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TOKENS = 50


def segment(begin, end, document=0, groups=None, **bounds):
    """Frequencies, start tokens and a factor of its own, on positions far out."""
    shape = (8,) if groups is None else (1, groups, 8)
    factor = 1.3 if groups is None else torch.rand(1, groups, dtype=torch.float64) + 0.5
    return Segment(
        begin, end, document, torch.arange(2**20, 2**20 + end - document),
        torch.rand(shape, dtype=torch.float64), 2**20 + 3, torch.rand(8, dtype=torch.float64),
        factor, **bounds,
    )  # fmt: skip


CASES = {
    "tiers": lambda: ([segment(7, 20), segment(20, TOKENS)], {}),
    "one": lambda: ([segment(3, 31)], {"scale": 0.3}),
    "documents": lambda: ([segment(0, 9), segment(9, 30, 9), segment(30, 50, 9)], {}),
    "by head": lambda: ([segment(0, 20, groups=2), segment(20, 50, groups=2)], {"softcap": 2.0}),
    "window": lambda: ([segment(0, 20), segment(20, 50)], {"window": 11}),
    "padding": lambda: (
        [
            segment(a, b, key_start=torch.tensor([3, 0]), key_length=torch.tensor([b, min(b, 40)]))
            for a, b in ((0, 20), (20, 50))
        ],
        {},
    ),
}


def expected(q, k, v, segments, **options):
    """The same by the reference, one segment after another."""
    outs = []
    for s in segments:
        queries, keys = (
            ops.reference.rope(x, x[:, :0], positions, *s[4:8])[0]
            for x, positions in (
                (q[:, :, s.queries], s.positions[-len_of(s) :]), (k[:, :, s.keys], s.positions)
            )
        )  # fmt: skip
        bounds = {"key_start": s.key_start, "key_length": s.key_length}
        outs.append(ops.reference.attention(queries, keys, v[:, :, s.keys], **bounds, **options))
    return outs


def len_of(s):
    return s.end - s.begin


def moved(s, device):
    return s._replace(**{n: x.to(device) for n, x in s._asdict().items() if torch.is_tensor(x)})


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(backend, case, dtype):
    segments, options = CASES[case]()
    tensors = [torch.randn(2, h, TOKENS, 24).to(dtype) for h in (4, 2, 2)]
    grads = [torch.randn(2, 4, len_of(s), 24).to(dtype) for s in segments]

    def run(function, device, dtype):
        there = [t.to(device, dtype).requires_grad_() for t in tensors]
        outs = function(*there, [moved(s, device) for s in segments], **options)
        wanted = [g.to(device, dtype) for g in grads]
        return [*outs, *torch.autograd.grad(outs, there, wanted)]

    exact, low = (run(expected, "cpu", d) for d in (torch.float64, dtype))
    got = run(attend_segments, backend.device, dtype)
    count = len(segments)
    lse = torch.zeros(1)  # scores of a few units
    for index, results in enumerate(zip(got, low, exact, strict=True)):
        floor = None if index < count else gradient_floor(results[2], dtype, lse)
        assert_as_accurate(*results, floor=floor, name=f"{index}")


def test_a_second_derivative_is_refused():
    """As by the other ops of attention."""
    segments, options = CASES["one"]()
    tensors = [torch.randn(2, h, TOKENS, 24, requires_grad=True) for h in (4, 2, 2)]
    (out,) = attend_segments(*tensors, segments, **options)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(out.sum(), tensors, create_graph=True)
