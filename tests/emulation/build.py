"""Compile `.cu` sources as C++ with the host runtime, once per content."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
CACHE = ROOT / "build" / "emulation"
RUNTIME = (HERE / "fiber.cpp", HERE / "runtime.cpp", HERE / "warpgroup.cpp")
FLAGS = (
    "-std=c++17",
    "-O1",
    "-g1",
    "-fPIC",
    "-fno-strict-aliasing",  # device code reads memory as packs of 16 bytes
    "-ffp-contract=off",
    "-fvisibility-inlines-hidden",
    "-Wall",
    "-Wextra",
    "-Werror",
    "-Wno-unknown-pragmas",  # unroll
    "-Wno-sign-compare",  # threadIdx is unsigned
)
SANITIZE = ("-fsanitize=address", "-fno-omit-frame-pointer")


@cache
def compiler() -> list[str] | None:
    """The command of the C++ compiler ($CXX, else g++ or clang++), or None without one."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    found = shutil.which("g++") or shutil.which("clang++")
    return [found] if found else None


def _run(command: list[str]) -> bytes:
    result = subprocess.run(command, capture_output=True, check=False)
    if result.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{result.stderr.decode()}")
    return result.stdout


def _object(source: Path, flags: tuple[str, ...]) -> Path:
    """The object file of `source`, compiled unless one of the same preprocessed text is there."""
    command = [*compiler(), *flags, f"-I{ROOT / 'csrc'}", f"-I{HERE.parent}", "-x", "c++"]
    text = _run([*command, "-E", str(source)])
    key = hashlib.sha256(b"\0".join([*map(str.encode, command), text]))
    target = CACHE / f"{source.stem}-{key.hexdigest()[:20]}.o"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.tmp")
        _run([*command, "-c", str(source), "-o", str(partial)])
        partial.rename(target)
    return target


def torch_flags() -> tuple[str, ...]:
    """What a source with torch's headers takes, compiled fast: host code has no need to be fast."""
    from torch.utils.cpp_extension import include_paths

    return (*(f"-isystem{path}" for path in include_paths()), "-O0", "-g0")


def build(
    name: str, sources: tuple[Path, ...], *, host: tuple[Path, ...] = (), executable=False, flags=()
) -> Path:
    """Compile and link `sources` with the runtime; the path of the library or program.

    Parameters
    ----------
    name
        Stem of the result.
    sources
        `.cu` and `.cpp` files.
    host
        `.cpp` files that include torch.
    executable
        A program under AddressSanitizer instead of a shared library.
    flags
        More compiler flags.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    flags = (*FLAGS, *flags, *(SANITIZE if executable else ()))
    with open(CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test processes build once
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            more = (*flags, *torch_flags()) if host else ()
            # The products of a warpgroup take their time without vectors.
            jobs = [pool.submit(_object, s, (*flags, "-O3")) for s in RUNTIME]
            jobs += [pool.submit(_object, s, flags) for s in sources]
            jobs += [pool.submit(_object, s, more) for s in host]
            objects = [job.result() for job in jobs]
        key = hashlib.sha256("\0".join(map(str, objects)).encode()).hexdigest()[:20]
        target = CACHE / f"{name}-{key}{'' if executable else '.so'}"
        if not target.exists():
            link = list(SANITIZE) if executable else ["-shared"]
            if host:
                from torch.utils.cpp_extension import library_paths

                link += [f"-L{path}" for path in library_paths()] + ["-ltorch_cpu", "-lc10"]
            _run([*compiler(), *map(str, objects), *link, "-o", f"{target}.tmp"])
            Path(f"{target}.tmp").rename(target)
    return target


class Runtime:
    """A loaded library and the order in which its threads run."""

    ORDERS = ("forward", "reverse", "shuffle")

    def __init__(self, path: Path):
        self.library = ctypes.CDLL(str(path))
        self.library.emulation_last_kernel.restype = ctypes.c_char_p

    def set_order(self, order: str, seed: int = 0) -> None:
        """Run threads and blocks `"forward"`, `"reverse"` or in a random order from now on."""
        self.library.emulation_set_order(self.ORDERS.index(order), ctypes.c_uint(seed))

    def last_kernel(self) -> str:
        """Name the kernel that ran last."""
        return self.library.emulation_last_kernel().decode()

    @contextmanager
    def capability(self, capability: int) -> Iterator[None]:
        """Give blocks the shared memory of another chip: 80, 86 (else), 89, 90, 100 or 120."""
        self.library.emulation_set_capability(capability)
        try:
            yield
        finally:
            self.library.emulation_set_capability(86)
