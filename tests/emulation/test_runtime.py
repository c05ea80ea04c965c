"""The host runtime is tested before it judges any kernel: what works, and what it catches."""

from __future__ import annotations

import ctypes
import subprocess

import numpy as np
import pytest
import torch

from emulation.build import HERE, Runtime, build, compiler

pytestmark = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")

SOURCE = HERE / "selftest.cu"
ORDERS = [("forward", 0), ("reverse", 0), ("shuffle", 0), ("shuffle", 1)]


@pytest.fixture(scope="module")
def runtime():
    loaded = Runtime(build("selftest", (SOURCE,)))
    loaded.library.selftest_run.restype = ctypes.c_char_p
    yield loaded
    loaded.set_order("forward")


def execute(runtime, name, data, size, order=("forward", 0)):
    """Run one kernel of selftest.cu; its output, or RuntimeError with the report."""
    data = np.ascontiguousarray(data, dtype=np.float32)
    out = np.zeros(size, dtype=np.float32)
    runtime.set_order(*order)
    pointers = [ctypes.c_void_p(a.ctypes.data) for a in (data, out)]
    report = runtime.library.selftest_run(name.encode(), *pointers)
    if report is not None:
        raise RuntimeError(report.decode())
    return out


def line_of(text, nth=0):
    """`file:line` of the nth line of selftest.cu that contains `text`."""
    lines = SOURCE.read_text().splitlines()
    return f"selftest.cu:{[i for i, line in enumerate(lines, 1) if text in line][nth]}"


def function(name):
    """Line number where kernel `name` begins in selftest.cu."""
    return int(line_of(f"void {name}(").split(":")[1])


@pytest.fixture
def numbers():
    return np.random.default_rng(0).standard_normal(1024).astype(np.float32)


@pytest.fixture(params=ORDERS, ids=lambda o: f"{o[0]}{o[1]}")
def order(request):
    return request.param


def test_threads_that_left_do_not_hold_up_a_barrier(runtime, numbers, order):
    out = execute(runtime, "early_return", numbers, 64, order)
    assert np.array_equal(out[:40], numbers[:40][::-1])
    assert not out[40:].any()


def test_a_missing_barrier_shows(runtime, numbers):
    results = [execute(runtime, "missing_barrier", numbers, 64, order) for order in ORDERS]
    assert all(np.isnan(r).any() for r in results)  # poison was read
    assert any(not np.array_equal(r, results[0], equal_nan=True) for r in results[1:])


def test_shuffles(runtime, numbers, order):
    x, lane = numbers[:32], np.arange(32)
    out = execute(runtime, "shuffles", x, 224, order).reshape(7, 32)
    assert np.array_equal(out[0], x[lane // 8 * 8 + 3])
    assert np.array_equal(out[1], x[lane ^ 2])
    assert np.array_equal(out[2], x[np.where(lane % 16 >= 1, lane - 1, lane)])
    assert np.array_equal(out[3], x[np.where(lane % 8 + 3 < 8, lane + 3, lane)])
    assert np.array_equal(out[4], x[lane ^ 16])
    assert np.unique(out[5]).size == 1
    assert out[5, 0] == pytest.approx(x.astype(np.float64).sum(), rel=1e-5)
    assert np.array_equal(out[6], x.reshape(8, 4).max(1).repeat(4))


def test_partial_masks_and_exited_lanes(runtime, numbers, order):
    x, lane = numbers[:32], np.arange(32)
    out = execute(runtime, "partial_masks", x, 160, order).reshape(5, 32)
    assert np.array_equal(out[0], np.where(lane < 16, x[lane ^ 1], x[lane ^ 2]))
    assert np.array_equal(out[1, :16], x[8:24])
    assert np.isnan(out[1, 16:24]).all()  # their sources have left: poison
    assert (out[2, :24] == float(0x555555)).all()  # even lanes below 24
    assert not out[3].any()
    assert out[4, :24].all() and not out[4, 24:].any()


def test_named_barriers(runtime, numbers, order):
    assert np.array_equal(execute(runtime, "named_barriers", numbers, 128, order), numbers[:128])


def test_a_deadlock_names_thread_primitive_and_line(runtime, numbers, order):
    with pytest.raises(RuntimeError) as caught:
        execute(runtime, "deadlock", numbers, 64, order)
    message = str(caught.value)
    assert message.startswith("kernel deadlock, block (0, 0, 0): deadlock")
    assert "thread (0, 0, 0) and 31 more at bar.sync" in message
    assert line_of("bar_sync(3, 64)") in message
    assert message.endswith("32 exited")


@pytest.mark.parametrize(
    ("kernel", "primitives"),
    [
        ("lost_lane", ("__shfl_xor_sync", "__syncthreads")),
        ("divergent_warp", ("__shfl_xor_sync", "__ballot_sync")),
        ("divergent_barrier", ("__syncthreads", "__syncthreads")),
    ],
)
def test_divergence_is_reported_with_both_places(runtime, numbers, order, kernel, primitives):
    with pytest.raises(RuntimeError) as caught:
        execute(runtime, kernel, numbers, 64, order)
    message = str(caught.value)
    assert all(p in message for p in primitives)
    lines = {int(part[:3].strip("):; ")) for part in message.split("selftest.cu:")[1:]}
    start = function(kernel)
    assert len(lines) == 2 and all(start < line < start + 9 for line in lines)


def test_asynchronous_copies(runtime, numbers, order):
    out = execute(runtime, "async_copies", numbers, 256, order)
    expected = numbers[:256].reshape(2, 128).copy()
    expected[:, 124:] = 0  # the last vector was said not to exist
    assert np.array_equal(out.reshape(2, 128), expected[:, ::-1])


def test_a_missing_wait_shows(runtime, numbers, order):
    out = execute(runtime, "async_missing_wait", numbers, 256, order)
    assert np.isfinite(out[:128]).all()
    assert np.isnan(out[128:]).all()


def test_shared_memory_starts_as_poison_in_every_block(runtime, numbers, order):
    assert np.isnan(execute(runtime, "stale_shared", numbers, 192, order)).all()


@pytest.mark.parametrize("kernel", ["load_matrices", "load_transposed"])
def test_ldmatrix(runtime, numbers, order, kernel):
    tile = torch.from_numpy(numbers[:256]).bfloat16().float().numpy().reshape(16, 16)
    out = execute(runtime, kernel, numbers, 448, order).reshape(7, 8, 8)
    for m, got in enumerate([*out[:4], *out[4:6], out[6]]):
        m = m if m < 4 else m - 4 if m < 6 else 0
        block = tile[8 * (m % 2) : 8 * (m % 2) + 8, 8 * (m // 2) : 8 * (m // 2) + 8]
        assert np.array_equal(got, block.T if kernel == "load_transposed" else block)


@pytest.mark.parametrize("kernel", ["multiply_bf16", "multiply_f16", "multiply_loaded"])
def test_mma_is_a_matrix_product(runtime, numbers, order, kernel):
    dtype = torch.float16 if kernel == "multiply_f16" else torch.bfloat16
    rounded = torch.from_numpy(numbers).to(dtype).double()
    a, b = rounded[:256].view(16, 16), rounded[256:384].view(16, 8)
    c = torch.from_numpy(numbers[384:512]).double().view(16, 8)
    out = execute(runtime, kernel, numbers, 128, order).reshape(16, 8)
    bound = 17 * 2.0**-24 * (a.abs() @ b.abs() + c.abs())
    assert (torch.from_numpy(out).double() - (a @ b + c)).abs().le(bound).all()


def test_atomics(runtime, order):
    out = execute(runtime, "atomics", np.arange(100), 2, order)
    assert out[0] == 200
    assert out[1:].view(np.int32)[0] == 99


def test_the_orders_expose_a_sum_in_arrival_order(runtime, numbers):
    sums = {execute(runtime, "ordered_sum", numbers, 1, order)[0] for order in ORDERS}
    assert len(sums) > 1


def test_an_order_repeats(runtime, numbers):
    first, again = (execute(runtime, "ordered_sum", numbers, 1, ("shuffle", 7)) for _ in "ab")
    assert np.array_equal(first, again)


@pytest.mark.parametrize(
    ("kernel", "expected"),
    [
        ("misaligned", "load: address not aligned to 16 bytes"),
        ("left_arrival", "bar.arrive (selftest.cu:"),
        ("beyond_shared", "cp.async: address outside shared memory"),
        ("too_many_threads", "block (1056, 1, 1) is not within 1024 threads"),
        (
            "too_much_shared",
            "too_much_shared: expected a device whose blocks get 204800 bytes of shared memory, "
            "got 101376",
        ),
        (
            "too_many_blocks",
            "too_many_blocks: expected at most 2147483647 by 65535 blocks, got 2147483648 by 1",
        ),
    ],
)
def test_misuse_is_refused(runtime, numbers, kernel, expected):
    with pytest.raises(RuntimeError) as caught:
        execute(runtime, kernel, numbers, 64)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("capability", "kib"), [(80, 163), (86, 99), (89, 99), (120, 99)])
def test_shared_memory_is_that_of_the_chip(runtime, numbers, capability, kib):
    with runtime.capability(capability), pytest.raises(RuntimeError, match=f"got {kib * 1024}$"):
        execute(runtime, "too_much_shared", numbers, 64)
    with runtime.capability(90):
        out = execute(runtime, "too_much_shared", numbers, 64)
    assert np.array_equal(out[8:32], numbers[8:32][::-1])  # what 32 threads wrote


def test_the_runtime_survives_an_error(runtime, numbers):
    for kernel in ("deadlock", "divergent_warp", "misaligned"):
        with pytest.raises(RuntimeError):
            execute(runtime, kernel, numbers, 64)
        out = execute(runtime, "early_return", numbers, 64)
        assert np.array_equal(out[:40], numbers[:40][::-1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_agree_with_torch(runtime, dtype):
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    wide = torch.empty(every.numel())
    is_bf16 = ctypes.c_int(dtype == torch.bfloat16)

    def call(name, source, target):
        pointers = [ctypes.c_void_p(t.data_ptr()) for t in (source, target)]
        getattr(runtime.library, name)(is_bf16, *pointers, ctypes.c_int64(source.numel()))

    call("selftest_to_float", every, wide)
    expected = every.view(dtype).float()
    assert torch.equal(wide.nan_to_num(12345.0), expected.nan_to_num(12345.0))
    # Every representable value, the ties between neighbours, and values just off them.
    values = torch.cat([expected, expected * (1 + 2.0**-9), torch.randn(20000).exp2() * 1e-3])
    values = torch.cat([values, torch.nextafter(values, torch.tensor(float("inf")))])
    narrow = torch.empty(values.numel(), dtype=torch.int16)
    call("selftest_from_float", values, narrow)
    assert torch.equal(narrow.view(dtype).nan_to_num(1.0), values.to(dtype).nan_to_num(1.0))


def test_addresses_out_of_bounds_are_reported_under_address_sanitizer():
    try:
        program = build("selftest_asan", (SOURCE,), executable=True, flags=("-DSELFTEST_MAIN",))
    except RuntimeError as error:
        if "asan" in str(error):
            pytest.skip("no AddressSanitizer")
        raise

    def run(kernel):
        return subprocess.run([program, kernel], capture_output=True, text=True, check=False)

    assert run("early_return").returncode == 0
    broken = run("beyond_the_end")
    assert "heap-buffer-overflow" in broken.stderr
    assert "beyond_the_end" in broken.stderr
