"""The library of all CUDA kernels built for the CPU, and what the ops' params structs share."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int64, c_void_p
from functools import cache

import torch

from emulation.build import HERE, ROOT, Runtime, build

#: The enum DType of csrc/common/dtype.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}


POISON = 0xFF  # NaN in every floating-point type
WORKSPACE_ALIGNMENT = 128


#: How many kernels `call` has been asked for: what shows that a test reached them.
calls = 0


@cache
def runtime() -> Runtime:
    """Build (once) and load the emulated kernels."""
    kernels = tuple(sorted((ROOT / "csrc").glob("*/cuda/**/*.cu")))
    return Runtime(build("kernels", (*kernels, HERE / "library.cpp")))


@contextmanager
def attention_kernel(name: str, capability: int = 90) -> Iterator[None]:
    """Attend on a device of that capability by `"wgmma"` wherever it can, `"mma"` or `"auto"`."""
    choose = runtime().library.emulated_set_attention_kernel
    choose.restype = ctypes.c_char_p
    if error := choose(name.encode()):
        raise ValueError(error.decode())
    try:
        with runtime().capability(capability):
            yield
    finally:
        choose(b"auto")


def call(
    name: str, params: ctypes.Structure, outputs: tuple[torch.Tensor, ...], workspace: int = 0
) -> None:
    """Run `name` of library.cpp in three thread orders, which must agree in every bit.

    Parameters
    ----------
    name
        The function.
    params
        Its argument.
    outputs
        What it writes; restored before each run, so they may be inputs too.
    workspace
        Bytes that it takes as a second argument, poison before each run; none where 0.

    Raises
    ------
    RuntimeError
        With the runtime's report.
    AssertionError
        Where the orders disagree, or a kernel wrote beside a tensor of `fresh`.
    """
    global calls
    calls += 1
    check_layout(type(params))
    function = getattr(runtime().library, name)
    function.restype = ctypes.c_char_p
    before = [t.clone() for t in outputs]
    room = torch.empty(workspace + 2 * WORKSPACE_ALIGNMENT, dtype=torch.uint8)
    begin = -room.data_ptr() % WORKSPACE_ALIGNMENT
    arguments = (ctypes.byref(params), *([c_void_p(room.data_ptr() + begin)] if workspace else []))
    first = None
    for order in Runtime.ORDERS:
        for tensor, content in zip(outputs, before, strict=True):
            tensor.copy_(content)
        room.fill_(POISON)
        runtime().set_order(order, seed=len(before))
        error = function(*arguments)
        if error is not None:
            raise RuntimeError(error.decode())
        bits = [_bits(t) for t in outputs]
        first = first or bits
        same = all(torch.equal(a, b) for a, b in zip(first, bits, strict=True))
        assert same, f"{name}: the result depends on the order of threads ({order})"
        behind = room[begin + workspace :]
        assert (behind == POISON).all(), f"{name}: wrote behind its workspace"
    for margin, poison in _margins:
        assert torch.equal(margin, poison), f"{name}: wrote beside its output"
    _margins.clear()


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).clone()


@cache
def check_layout(struct: type[ctypes.Structure]) -> None:
    """Refuse to call with a struct whose C++ side has changed."""
    size = getattr(runtime().library, f"sizeof_{struct.__name__}")
    size.restype = c_int64
    assert size() == ctypes.sizeof(struct), f"{struct.__name__} differs from its header"


class Heads(ctypes.Structure):
    """`[batch, heads, tokens, head_dim]` with stride 1 in head_dim."""

    _fields_ = [
        ("data", c_void_p),
        ("heads", c_int64),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    ]

    @classmethod
    def of(cls, tensor: torch.Tensor, heads: int | None = None) -> Heads:
        """Describe `tensor`; `heads` 0 leaves it out."""
        strides = tensor.stride()[:3]
        return cls(tensor.data_ptr(), tensor.shape[1] if heads is None else heads, *strides)


#: What surrounds the outputs of the call under way, and what it held before.
_margins: list[tuple[torch.Tensor, torch.Tensor]] = []
MARGIN = 64  # elements


def fresh(like: torch.Tensor) -> torch.Tensor:
    """Return poison in the memory order that the bindings allocate for `like`, inside margins."""
    batch, heads, tokens, head_dim = like.shape
    tokens_first = like.stride(1) < like.stride(2)
    shape = (batch, tokens, heads, head_dim) if tokens_first else tuple(like.shape)
    out = poisoned(shape, like.dtype)
    return out.transpose(1, 2) if tokens_first else out


def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return a contiguous tensor of NaN; `call` checks that its surroundings stay as they are."""
    size = math.prod(shape)
    whole = torch.full((size + 2 * MARGIN,), float("nan"), dtype=dtype)
    for margin in (whole[:MARGIN], whole[MARGIN + size :]):
        bits = margin.view(torch.uint8)
        _margins.append((bits, bits.clone()))
    return whole[MARGIN : MARGIN + size].view(shape)
