"""What all benchmarks share: check, then time side by side, then append rows to a CSV.

Every benchmark script builds one setup per shape that yields named implementations with the same
signature; the first is the baseline that ratios are quoted against. Implementations are timed in
turns (a, b, c, a, b, c, ...), so that a change of the machine's load meets all of them, and the
ratio is the median over rounds of the ratio within a round.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
#: Where a row was measured, see `where`.
WHERE = ["device", "threads", "torch", "commit"]
FIELDS = [
    "op", "case", "dtype", "implementation", "milliseconds", "ratio_to_baseline", "rate",
    "rate_unit", "device", "isa", *WHERE[1:],
]  # fmt: skip


def parser(description: str) -> argparse.ArgumentParser:
    """Return the flags that every benchmark takes."""
    p = argparse.ArgumentParser(description=description)
    p.add_argument("--device", default="cpu", help="cpu or cuda")
    p.add_argument("--rounds", type=int, default=9, help="timed rounds over all implementations")
    p.add_argument("--seconds", type=float, default=0.15, help="least time per measurement")
    p.add_argument(
        "--processor-time", action="store_true",
        help="count the processor's time: for one thread on a machine that others use too",
    )  # fmt: skip
    p.add_argument("--save", action="store_true", help="append rows to benchmarks/results/")
    p.add_argument("--csv", type=Path, help="append rows to this file, as they come")
    p.add_argument(
        "--graph", action="store_true",
        help="on CUDA: time replays of a captured graph, without the host's time for a call",
    )  # fmt: skip
    p.add_argument("--quick", action="store_true", help="small shapes, to try the script")
    return p


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with its family and model.

    Names of virtual processors say no more than their maker's: "AMD EPYC" is one with AVX-512 or
    without it, with registers of 512 bits or halves of them.
    """
    if device == "cuda":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    first = cpuinfo.read_text().partition("\n\n")[0]
    lines = (line.partition(":") for line in first.splitlines())
    said = {key.strip(): value.strip() for key, _, value in lines}
    name = said.get("model name", platform.machine())
    return ", ".join(
        [name, *(f"{key} {said[key]}" for key in ("cpu family", "model") if key in said)]
    )


def commit() -> str:
    """Return the short hash of the checked-out commit, with `+` where the tree is changed.

    `$COMMIT` says it for a copy of the tree without its history.
    """
    if "COMMIT" in os.environ:
        return os.environ["COMMIT"]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    changed = git(
        "status", "--porcelain", "--untracked-files=no", ":(top,exclude)benchmarks/results"
    )
    return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")


def where(device: str = "cpu") -> dict[str, str | int]:
    """Return the columns of `WHERE`: where a row was measured, and by which commit."""
    found = device_name(device), torch.get_num_threads(), torch.__version__, commit()
    return dict(zip(WHERE, found, strict=True))


def ranged(ranges: Sequence[tuple[int, int]], values: Sequence[float]) -> str:
    """Return the column of perplexities by range of positions, "0-255:2.9103 256-511:2.8652"."""
    pairs = zip(ranges, values, strict=True)
    return " ".join(f"{begin}-{end - 1}:{value:.4f}" for (begin, end), value in pairs)


def by_ranges(row: dict) -> dict[str, float]:
    """Return the perplexities of a row's column `by_range`, by the names of the ranges."""
    parts = (part.split(":") for part in row["by_range"].split())
    return {name: float(value) for name, value in parts}


def _seconds_per_call(
    fn: Callable[[], object], device: str, least: float, clock: Callable[[], float]
) -> float:
    fn()  # not timed: it meets what the implementation before it left in caches and free memory
    calls = 1
    while True:
        if device == "cuda":
            torch.cuda.synchronize()
        start = clock()
        for _ in range(calls):
            fn()
        if device == "cuda":
            torch.cuda.synchronize()
        elapsed = clock() - start
        if elapsed >= least:
            return elapsed / calls
        calls = max(calls + 1, int(calls * 1.2 * least / max(elapsed, 1e-9)))


def _replay(fn: Callable[[], object]) -> Callable[[], object]:
    """Return a call that replays a CUDA graph of `fn`, which has run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fn()
    return graph.replay


def compare(
    op: str,
    case: str,
    dtype: str,
    implementations: dict[str, Callable[[], object]],
    args: argparse.Namespace,
    work: float = 0.0,
    unit: str = "",
) -> list[dict]:
    """Time the implementations in turns, print a table and return (and, if asked, save) rows.

    `work` is what one call does in units of `unit` (bytes moved / 1e9 for GB/s, operations / 1e9
    for GFLOP/s). Ratios above 1 mean faster than the baseline, the first implementation.
    """
    from longrope import _C

    names = list(implementations)
    for fn in implementations.values():
        fn()  # warm up: caches, compilation
    if args.graph and args.device == "cuda":
        implementations = {name: _replay(fn) for name, fn in implementations.items()}
    clock = time.process_time if args.processor_time else time.perf_counter
    rounds = [
        {n: _seconds_per_call(implementations[n], args.device, args.seconds, clock) for n in names}
        for _ in range(args.rounds)
    ]
    rows = []
    print(f"\n{op} {case} {dtype}")
    for name in names:
        seconds = statistics.median(r[name] for r in rounds)
        ratio = statistics.median(r[names[0]] / r[name] for r in rounds)
        rate = work / seconds if work else ""
        shown = f"{rate:10.1f} {unit}" if work else ""
        print(f"  {name:36s} {seconds * 1e3:10.3f} ms  {ratio:7.2f}x  {shown}")
        rows.append(
            {
                "op": op,
                "case": case,
                "dtype": dtype,
                "implementation": name,
                "milliseconds": f"{seconds * 1e3:.4f}",
                "ratio_to_baseline": f"{ratio:.3f}",
                "rate": f"{rate:.2f}" if work else "",
                "rate_unit": unit,
                "isa": _C.isa() if args.device == "cpu" else "",
                **where(args.device),
            }
        )
    if args.csv:
        append(rows, args.csv)
    if args.save:
        save(rows, args.device)
    return rows


def save(rows: list[dict], device: str) -> Path:
    """Append rows to `results/<device name>.csv`."""
    name = re.sub("[^a-z0-9.]+", "-", device_name(device).lower()).strip("-")
    return append(rows, RESULTS / f"{name}.csv")


def saved(path: Path) -> list[dict]:
    """Return the rows of earlier calls; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def append(rows: list[dict], path: Path, fields: Sequence[str] = FIELDS) -> Path:
    """Append rows to a CSV, which gets a header of its fields where it is new."""
    path.parent.mkdir(exist_ok=True)
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, fields)
        if new:
            writer.writeheader()
        writer.writerows(rows)
    return path
