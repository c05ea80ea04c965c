"""The guard over backends: a test of a device that never reaches the device fails."""

from __future__ import annotations

import pytest
import torch
from support import backends

from longrope import ops


def used(backend, body):
    body(backend)
    backends.check_used(backend)


def rotate(device):
    x, at = torch.ones(1, 1, 3, 4, device=device), torch.arange(3, device=device)
    ops.rope(x, x, at, torch.ones(2, dtype=torch.float64, device=device))


def test_a_body_that_never_asks_for_the_device():
    with backends.use("cpu-scalar") as backend, pytest.raises(AssertionError, match="never asks"):
        used(backend, lambda backend: rotate("cpu"))


@pytest.mark.parametrize("name", [n for n in backends.names() if not n.startswith("cpu")])
def test_a_body_that_reaches_no_kernel(name):
    with backends.use(name) as backend:
        used(backend, lambda backend: rotate(backend.device))
    unreached = pytest.raises(AssertionError, match=f"no kernel of ours ran on {name}")
    with backends.use(name) as backend, unreached:
        used(backend, lambda backend: torch.ones(3, device=backend.device))


def test_a_device_that_is_pretended():
    """As on a GPU, with a test whose tensors stay on the CPU."""
    with backends.use("cpu-scalar"), pytest.raises(AssertionError, match="no kernel of ours"):
        used(backends.Backend("cuda", "cpu"), lambda backend: rotate(backend.device))
