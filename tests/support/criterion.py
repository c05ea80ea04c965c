"""The error criterion of every kernel test: judged against what plain torch loses itself."""

from __future__ import annotations

import torch


def assert_as_accurate(actual, low_precision, exact, *, factor=2.0, floor=None, name="result"):
    """Assert that `actual` is within `factor` times the error of the same maths in low precision.

    `exact` is the float64 reference, `low_precision` the same maths done by plain torch in the
    dtype under test. Elementwise: `|actual - exact| <= factor * E + floor`, where `E` is the
    largest error of `low_precision` over the tensor, and `floor` is a few roundings of the
    result's dtype at that element's magnitude (one value in a rounding step of its neighbour is
    not an error). NaN and infinities must stand in the same places, infinities with their sign.
    """
    assert actual.shape == exact.shape, f"{name}: shape {actual.shape}, expected {exact.shape}"
    assert low_precision.shape == exact.shape
    got, low, ref = (t.detach().to("cpu", torch.float64) for t in (actual, low_precision, exact))
    for kind in (torch.isnan, torch.isposinf, torch.isneginf):
        assert torch.equal(kind(got), kind(ref)), f"{name}: {kind.__name__} differs in places"
    finite = torch.isfinite(ref)
    if not finite.any():
        return
    got, low, ref = got[finite], low[finite], ref[finite]
    low_error = (low - ref).abs()
    low_error = low_error[torch.isfinite(low_error)]
    budget = factor * (low_error.max() if low_error.numel() else torch.tensor(0.0))
    eps = torch.finfo(actual.dtype).eps
    rounding = 2 * eps * ref.abs() + eps * eps if floor is None else floor
    error = (got - ref).abs()
    worst = (error - budget - rounding).max()
    assert worst <= 0, (
        f"{name}: error {error.max():.3e}, allowed {factor} x {budget / factor:.3e} + rounding"
    )


def gradient_floor(exact, dtype, lse):
    """Return the roundings of a gradient of attention that are luck, `[number of finite values]`.

    Its sums pass through values as large as the largest, in any order, and its weights are
    `exp(score - lse)` of a log-sum-exp that is kept in float32: a rounding of that moves a row.
    """
    finite = exact.isfinite()
    size = exact.masked_fill(~finite, 0).abs()
    largest_lse = lse.masked_fill(~lse.isfinite(), 0).abs().max().clamp(min=1)
    of_lse = torch.finfo(torch.float32).eps * largest_lse
    eps = torch.finfo(dtype).eps
    return (2 * eps * size + (eps + of_lse) * size.max())[finite]


def assert_nonzero_gradient(*tensors):
    """Assert that every tensor has a finite gradient that is not all zero."""
    for index, tensor in enumerate(tensors):
        assert tensor.grad is not None, f"input {index} has no gradient"
        assert torch.isfinite(tensor.grad).all(), f"the gradient of input {index} is not finite"
        assert tensor.grad.abs().max() > 0, f"the gradient of input {index} is all zero"
