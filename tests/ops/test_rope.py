"""ops.rope, ops.rope_ and ops.rerotate against their specification."""

from __future__ import annotations

import pytest
import torch

from longrope import ops


@pytest.mark.parametrize("interleaved", [False, True])
def test_first_light(backend, interleaved):
    """The kernel turns by the exact phase, like the reference, on every backend."""
    q, k = torch.randn(2, 5, 37, 40), torch.randn(2, 37, 2, 40).transpose(1, 2)
    positions = torch.randint(-5, 2**22, (2, 37))
    inv_freq, base = torch.rand(2, 12, dtype=torch.float64), torch.rand(12, dtype=torch.float64)
    arguments = (positions, inv_freq, torch.tensor([3, 0]), base, 1.1, interleaved)
    for got, expected in zip(
        ops.rope(q, k, *arguments), ops.reference.rope(q, k, *arguments), strict=True
    ):
        torch.testing.assert_close(got, expected)
