#!/usr/bin/env python3
"""Compile every CUDA kernel with nvcc, without a GPU, and hold ptxas to what each kernel states.

Machine code for sm_80 and sm_90, and compute_90 PTX for newer chips; what lies in a folder `sm90`
for sm_90a alone. A kernel states the most registers that it may use beside itself,
`LONGROPE_MAX_REGISTERS(kernel, 80)`; spills and local stack fail too unless a third argument
allows so many bytes of spills (not for forward kernels). In a folder `sm90` what ptxas says of
products of a warpgroup fails (C75xx: it serialised them or put in waits of its own), and so does
machine code without such products, where there is a cuobjdump to read it.

Exit status: 0 all within their ceilings, 1 an error or a kernel beyond them, 77 skipped because
there is no nvcc.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SKIPPED = 77  # the convention of automake and CTest
ARCHITECTURES = ("sm_80", "sm_90")
PTX = "compute_90"
SM90 = "compute_90a", "sm_90a"  # PTX and machine code; wgmma is not in sm_90
CEILING = re.compile(r"LONGROPE_MAX_REGISTERS\((\w+),\s*(\d+)(?:,\s*(\d+))?\)")
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
WARPGROUP = re.compile(r"\(C75\d\d\).*")
FUNCTION = re.compile(r"Function : (\w+)")


@dataclass
class Kernel:
    """What ptxas said about one instantiation on one architecture."""

    symbol: str
    architecture: str
    stack: int = 0
    spills: int = 0
    registers: int = 0


def tool(name: str) -> str | None:
    """Return the path of a CUDA tool: the search path, $CUDA_HOME, or the usual place."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which(name) or shutil.which(name, path=str(Path(home) / "bin"))


def is_sm90(source: Path) -> bool:
    """Tell whether a source is for compute capability 9.0 alone."""
    return source.parent.name == "sm90" or source.stem.endswith("_sm90")


def object_of(source: Path, folder: str) -> Path:
    """Return where the object file of a source goes."""
    return Path(folder, "-".join(source.with_suffix(".o").relative_to(ROOT).parts))


def without_products(program: Path) -> list[str]:
    """Return the kernels of an object file that have no product of a warpgroup; none unread."""
    reader = tool("cuobjdump")
    if reader is None:
        return []
    answer = subprocess.run([reader, "-sass", program], capture_output=True, text=True, check=True)
    kernels: dict[str, bool] = {}
    for line in answer.stdout.splitlines():
        if match := FUNCTION.search(line):
            kernels[name := match[1]] = False
        elif "HGMMA" in line:
            kernels[name] = True
    return [name for name, has in kernels.items() if not has]


def compile_source(compiler: str, source: Path, folder: str) -> tuple[Path, str, float]:
    """Compile one source; its path, ptxas' messages and the seconds taken. Raises on failure."""
    targets = [f"-gencode=arch=compute_{a[3:]},code={a}" for a in ARCHITECTURES]
    targets.append(f"-gencode=arch={PTX},code={PTX}")
    if is_sm90(source):
        targets = ["-gencode=arch={},code={}".format(*SM90)]
    command = [
        compiler, "-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", *targets,
        "-Werror=all-warnings", "-Xptxas=-v", "-c", source, "-o", object_of(source, folder),
    ]  # fmt: skip
    start = time.monotonic()
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{source.relative_to(ROOT)}:\n{result.stdout}{result.stderr}")
    return source, result.stdout + result.stderr, time.monotonic() - start


def parse(messages: str) -> list[Kernel]:
    """Read the kernels out of ptxas' messages."""
    kernels: list[Kernel] = []
    for line in messages.splitlines():
        if match := ENTRY.search(line):
            kernels.append(Kernel(*match.groups()))
        elif (match := SPILLS.search(line)) and kernels:
            kernels[-1].stack = int(match[1])
            kernels[-1].spills = int(match[2]) + int(match[3])
        elif (match := REGISTERS.search(line)) and kernels:
            kernels[-1].registers = int(match[1])
    return kernels


def demangle(symbols: list[str]) -> dict[str, str]:
    """Readable names, `kernel<arguments>`; the symbols themselves without c++filt."""
    if not shutil.which("c++filt"):
        return {s: s for s in symbols}
    answer = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True)
    names = {}
    for symbol, name in zip(symbols, answer.stdout.splitlines(), strict=True):
        name = re.sub(r"longrope::|cuda::|\(anonymous namespace\)::|^void ", "", name)
        names[symbol] = name.split("(")[0]
    return names


def judge(kernel: Kernel, ceilings: dict[str, tuple[int, int]]) -> tuple[str, str]:
    """Return the ceiling that is stated for `kernel`, and what is wrong (empty: nothing)."""
    for name, (registers, spills) in ceilings.items():
        if f"{len(name)}{name}" not in kernel.symbol:  # as the symbol spells a name
            continue
        if kernel.registers > registers:
            return str(registers), "more registers than stated"
        if kernel.spills > spills:
            return str(registers), "spills"
        if kernel.stack and not spills:
            return str(registers), "local stack"
        return str(registers), ""
    return "-", "states no LONGROPE_MAX_REGISTERS"


def main() -> int:
    """Compile, print the table, say what failed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("sources", nargs="*", type=Path, help="default: csrc/*/cuda/**/*.cu")
    arguments = parser.parse_args()
    compiler = tool("nvcc")
    if compiler is None:
        print("nvcc_check: SKIPPED: no nvcc on this machine (set CUDA_HOME)")
        return SKIPPED
    sources = [s.resolve() for s in arguments.sources] or sorted(ROOT.glob("csrc/*/cuda/**/*.cu"))
    # The kernels of the emulation's own tests: every wrapper must assemble.
    selftests = sorted(ROOT.glob("tests/emulation/selftest*.cu"))
    try:
        with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
            jobs = [
                pool.submit(compile_source, compiler, s, folder) for s in (*sources, *selftests)
            ]
            results = [job.result() for job in jobs]
            scalar = {s: without_products(object_of(s, folder)) for s in sources if is_sm90(s)}
    except RuntimeError as error:
        print(f"nvcc_check: FAILED to compile {error}")
        return 1

    failures = 0
    print(f"{'kernel':60} {'arch':6} {'registers':>9} {'ceiling':>7} {'spills':>6} {'stack':>5}")
    for source, messages, seconds in results:
        print(f"{source.relative_to(ROOT)} ({seconds:.0f} s)")
        if source in selftests:
            continue
        text = source.read_text() + "".join(p.read_text() for p in source.parent.glob("*.cuh"))
        ceilings = {m[1]: (int(m[2]), int(m[3] or 0)) for m in CEILING.finditer(text)}
        wrong = [m[0] for m in WARPGROUP.finditer(messages)] if is_sm90(source) else []
        wrong += [f"{symbol}: no HGMMA" for symbol in scalar.get(source, [])]
        failures += len(wrong)
        for line in wrong:
            print(f"  {line}  <--")
        kernels = parse(messages)
        names = demangle([k.symbol for k in kernels])
        for k in sorted(kernels, key=lambda k: (names[k.symbol], k.architecture)):
            ceiling, wrong = judge(k, ceilings)
            failures += bool(wrong)
            print(
                f"  {names[k.symbol]:58} {k.architecture:6} {k.registers:9} {ceiling:>7} "
                f"{k.spills:6} {k.stack:5}{'  <-- ' + wrong if wrong else ''}"
            )
    print(f"nvcc_check: {failures} beyond their ceilings" if failures else "nvcc_check: passed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
