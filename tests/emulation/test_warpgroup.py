"""What compute capability 9.0 adds to the runtime: what works, and the mistakes that it catches."""

from __future__ import annotations

import ctypes

import pytest
import torch

from emulation.build import HERE, Runtime, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

ORDERS = [("forward", 0), ("reverse", 0), ("shuffle", 0), ("shuffle", 1)]


@pytest.fixture(scope="module")
def runtime():
    loaded = Runtime(build("selftest_sm90", (HERE / "selftest_sm90.cu",)))
    loaded.library.selftest_sm90_run.restype = ctypes.c_char_p
    yield loaded
    loaded.set_order("forward")


@pytest.fixture(params=ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def order(request):
    return request.param


def integers(rows, low, high):
    return torch.randint(low, high + 1, (rows, 64)).float()


def execute(runtime, name, dtype, order):
    """Run `(A B^T) V`; what came out and what is right, exact in every dtype."""
    a, b, v = integers(64, -1, 1), integers(128, -1, 1), integers(128, -2, 2)
    out = torch.full((64, 64), float("nan"))
    runtime.set_order(*order)
    matrices = [x.to(dtype) for x in (a, b, v)]
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*matrices, out)]
    report = runtime.library.selftest_sm90_run(
        name.encode(), ctypes.c_bool(dtype == torch.bfloat16), *pointers
    )
    if report is not None:
        raise RuntimeError(report.decode())
    return out, a @ b.T @ v


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_copies_barriers_and_products(runtime, order, dtype):
    out, expected = execute(runtime, "right", dtype, order)
    assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "mistake",
    ["copy not awaited", "sums not awaited", "operand overwritten", "released early"],
)
def test_what_happens_too_early_shows(runtime, order, mistake):
    out, expected = execute(runtime, mistake, torch.bfloat16, order)
    assert not torch.equal(out, expected)


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("never released", "deadlock; .*mbarrier.try_wait"),
        ("no fence", "expected a wgmma.fence before it"),
        ("product left behind", "a product of a warpgroup was never waited for"),
        ("copy left behind", "a copy of a tensor tile was never waited for"),
        ("arrival too many", "one arrival too many"),
        ("barrier not made", "no barrier was made there"),
        ("tile misaligned", "address not aligned to 1024 bytes"),
    ],
)
def test_misuse_is_reported(runtime, order, mistake, report):
    with pytest.raises(RuntimeError, match=report):
        execute(runtime, mistake, torch.bfloat16, order)


def test_a_matrix_named_wrongly_gives_another_product(runtime, order):
    out, expected = execute(runtime, "wrong stride", torch.bfloat16, order)
    assert not torch.equal(out, expected)


def test_the_runtime_survives_an_error(runtime):
    for mistake in ("never released", "product left behind", "no fence"):
        with pytest.raises(RuntimeError):
            execute(runtime, mistake, torch.bfloat16, ("forward", 0))
        out, expected = execute(runtime, "right", torch.bfloat16, ("forward", 0))
        assert torch.equal(out, expected)
