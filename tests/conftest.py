"""Fixtures shared by all tests."""

from __future__ import annotations

import pytest
import torch
from support import backends
from support.threads import threads

from longrope import _C


@pytest.fixture(params=_C.isas())
def isa(request):
    """Run the test once per CPU instruction set that this processor has."""
    before = _C.isa()
    _C.set_isa(request.param)
    yield request.param
    _C.set_isa(before)


@pytest.fixture(params=backends.names())
def backend(request):
    """Run the test over the CPU kernels of each instruction set and the CUDA kernels."""
    with backends.use(request.param) as used:
        yield used


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Fail a test that passes over a backend whose kernels it did not reach."""
    result = yield
    if isinstance(used := item.funcargs.get("backend"), backends.Backend):
        backends.check_used(used)
    return result


@pytest.fixture(autouse=True)
def seeded():
    """Start every test from the same random state."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_reports(request, monkeypatch):
    """Let runs write no report, which takes a second each; `reports` asks for them."""
    if "reports" not in request.fixturenames:
        monkeypatch.setattr("longrope.report.writing.write", lambda folder: None)


@pytest.fixture
def reports():
    """Let the runs of a test write their reports."""


@pytest.fixture
def one_thread():
    """Run tiny models on one thread: two that wait for each other on a busy machine take 100x."""
    with threads(1):
        yield
