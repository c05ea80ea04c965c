"""torch.ops.longrope.linear_nll and its relatives over the emulated kernels.

linear_nll runs as csrc/bindings/perplexity_chunks.h has it for CUDA, loops, matrix products and
all, with chunks so small that tests meet their borders.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from emulation import library
from emulation.build import HERE, ROOT, Runtime, build
from emulation.library import call, poisoned

#: Of a chunk of logits.
ROWS, COLUMNS = 48, 136


class CandidateSumsParams(ctypes.Structure):
    """As csrc/perplexity/perplexity.h says."""

    _fields_ = [
        *((name, c_void_p) for name in ("nll", "targets", "candidate")),
        *((name, c_int64) for name in ("rows", "candidates", "ignore_index")),
        *((name, c_void_p) for name in ("sums", "counts")),
    ]


@cache
def host() -> Runtime:
    """Build (once) and load linear_nll's host code over the emulated kernels."""
    kernels = tuple(sorted((ROOT / "csrc" / "perplexity" / "cuda").glob("*.cu")))
    path = build("perplexity", kernels, host=(HERE / "perplexity_host.cpp",))
    torch.ops.load_library(path)
    return Runtime(path)


def in_every_order(name: str, *arguments) -> tuple[torch.Tensor, ...]:
    """Run an op of the host code in three thread orders, which must agree in every bit."""
    library.calls += 1
    runs = []
    for order in Runtime.ORDERS:
        host().set_order(order)
        # Memory that torch hands out is NaN first, as anything may be on a device.
        with uninitialized_is_nan(), products_of_16_bits():
            run = getattr(torch.ops.longrope_emulated, name)(*arguments, ROWS, COLUMNS)
        runs.append(run if isinstance(run, tuple) else (run,))
        for first, now in zip(runs[0], runs[-1], strict=True):
            same = torch.equal(first.view(torch.uint8), now.view(torch.uint8))
            assert same, f"{name}: the result depends on the order of threads ({order})"
    return runs[0]


@contextmanager
def uninitialized_is_nan() -> Iterator[None]:
    """Fill what torch allocates with NaN."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which is what that hangs on
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextmanager
def products_of_16_bits() -> Iterator[None]:
    """Give the CPU the products of 16-bit matrices in float32, which torch has on CUDA alone."""

    def mm(a, b, out_dtype, *, out):
        return torch.mm(a.to(out_dtype), b.to(out_dtype), out=out)

    def addmm(c, a, b, out_dtype, *, beta=1, alpha=1, out):
        wide = a.to(out_dtype), b.to(out_dtype)
        return torch.addmm(c, *wide, beta=beta, alpha=alpha, out=out)

    cpu = torch.library.Library("aten", "IMPL")
    cpu.impl("mm.dtype_out", mm, "CPU")
    cpu.impl("addmm.dtype_out", addmm, "CPU")
    try:
        yield
    finally:
        cpu._destroy()


def linear_nll(hidden, weight, targets, ignore_index=-100, softcap=None):
    """longrope::linear_nll."""
    return in_every_order("linear_nll", hidden, weight, targets, ignore_index, softcap)


def linear_nll_backward(*arguments):
    """longrope::linear_nll_backward."""
    return in_every_order("linear_nll_backward", *arguments)


def linear_nll_with_gradient(hidden, weight, targets, edge, ignore_index=-100, softcap=None):
    """longrope::linear_nll_with_gradient."""
    return in_every_order(
        "linear_nll_with_gradient", hidden, weight, targets, ignore_index, softcap
    )


def linear_nll_scale(grad_nll, gradient, targets, edge, ignore_index):
    """longrope::linear_nll_scale."""
    return in_every_order("linear_nll_scale", grad_nll, gradient, targets, ignore_index)[0]


def candidate_sums(nll, targets, candidate, candidates, ignore_index=-100):
    """longrope::candidate_sums."""
    held = [t.contiguous() for t in (nll, targets, candidate)]
    sums = poisoned((candidates,), torch.float64)
    counts = torch.full((candidates,), -1)
    params = CandidateSumsParams(
        *(t.data_ptr() for t in held), len(nll), candidates, ignore_index,
        sums.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    call("emulated_candidate_sums", params, (sums, counts))
    return sums, counts


IMPLEMENTATIONS = {
    f.__name__: f
    for f in (
        linear_nll, linear_nll_backward, linear_nll_with_gradient, linear_nll_scale, candidate_sums
    )
}  # fmt: skip
