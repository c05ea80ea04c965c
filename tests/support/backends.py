"""What an op's test bodies run over: each CPU instruction set, the emulated CUDA kernels, a GPU.

The emulated kernels run in three thread orders that must agree in every bit. They stand in for the
CPU kernels in torch's dispatcher for as long as a test runs, so that the same calls (autograd
included) reach them. What the bindings check before a kernel is called (dtypes, shapes, overlap) is
left to the CPU backends.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module

import pytest
import torch

from longrope._native import _C

#: Stems of the ops whose CUDA kernels exist: tests/emulation/<stem>.py calls them.
EMULATED = ("rope", "attention", "perplexity")


@dataclass(frozen=True)
class Backend:
    """Where a test body runs.

    Parameters
    ----------
    name
        `"cpu-<isa>"`, `"emulated"` or `"cuda"`; with `"-wgmma"` behind one of the last two, the
        kernel of compute capability 9.0 attends wherever it can.
    place
        The device of its tensors, which test bodies read as `device`.
    """

    name: str
    place: str
    launched: int = 0  # kernels of ours before the test
    asked: list[str] = field(default_factory=list)

    @property
    def device(self) -> str:
        """Where the tensors of a test live; a test body has to ask."""
        self.asked.append(self.place)
        return self.place

    @property
    def is_cuda(self) -> bool:
        """Whether the CUDA kernels answer, emulated or not."""
        return not self.name.startswith("cpu")

    @property
    def is_emulated(self) -> bool:
        """Whether the CUDA kernels answer on the CPU (slow: keep shapes small)."""
        return self.name.startswith("emulated")

    @property
    def dtypes(self) -> tuple[torch.dtype, ...]:
        """The dtypes that the ops take here."""
        every = (torch.float32, torch.bfloat16, torch.float16)
        return every if self.is_cuda else (*every, torch.float64)


def names() -> list[str]:
    """Every backend of this machine."""
    cpu = [f"cpu-{isa}" for isa in _C.isas()]
    gpu = ["cuda"] if torch.cuda.is_available() and _C.build_info()["cuda"] else []
    return [*cpu, "emulated", *gpu]


def wgmma_names() -> list[str]:
    """Every backend of this machine that has the attention kernel of compute capability 9.0."""
    built = "cuda" in names() and _C.build_info()["wgmma"]
    has = built and torch.cuda.get_device_capability() == (9, 0)
    return ["emulated-wgmma", *(["cuda-wgmma"] if has else [])]


@contextmanager
def use(name: str) -> Iterator[Backend]:
    """Make the ops run on the backend `name`."""
    kind, _, detail = name.partition("-")
    if kind == "cuda":
        before = _C.cuda_attention()
        _C.set_cuda_attention(detail or before)
        try:
            yield Backend(name, "cuda", launches(name))
        finally:
            _C.set_cuda_attention(before)
    elif kind == "cpu":
        before = _C.isa()
        _C.set_isa(detail)
        try:
            yield Backend(name, "cpu")
        finally:
            _C.set_isa(before)
    else:
        with _emulation():
            from emulation import library

            with library.attention_kernel(detail) if detail else nullcontext():
                yield Backend(name, "cpu", launches(name))


def launches(name: str) -> int | None:
    """Return how many of our CUDA kernels a backend has started so far; None where it has none."""
    if name.startswith("cuda"):
        return _C.cuda_launches()
    if name.startswith("emulated"):
        from emulation import library

        return library.calls
    return None


def check_used(backend: Backend) -> None:
    """Fail a test that passed on a backend without using it.

    A body that never asks for the device computes on the CPU wherever it runs, and one under which
    no kernel of ours was started has shown nothing about them.
    """
    assert backend.asked, "the test takes a backend and never asks for its device"
    after = launches(backend.name)
    assert after is None or after > backend.launched, f"no kernel of ours ran on {backend.name}"


@contextmanager
def _emulation() -> Iterator[None]:
    from emulation.build import compiler

    if compiler() is None:
        pytest.skip("no C++ compiler for the emulated kernels")
    override = torch.library.Library("longrope", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are overridden
            for op in EMULATED:
                implementations = import_module(f"emulation.{op}").IMPLEMENTATIONS
                for name, function in implementations.items():
                    override.impl(name, function, "CPU", allow_override=True)
        yield
    finally:
        override._destroy()
