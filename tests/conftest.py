"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch

from longrope import _C


@pytest.fixture(params=_C.isas())
def isa(request):
    """Run the test once per CPU instruction set that this processor has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state."""
    torch.manual_seed(0)
