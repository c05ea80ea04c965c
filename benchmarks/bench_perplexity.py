"""ops.linear_nll beside its matrix product alone and the usual cross-entropy of logits.

The floor is the product `hidden @ weight.T`, which the usual way computes first. Times are of the
forward, and of forward and backward with a frozen head (what the search for factors by gradient
does) and with a trained one. Peak memory is measured in processes of their own, above the inputs.
"""

from __future__ import annotations

import subprocess
import sys

import torch
from harness import compare, parser, save, where
from torch.nn import functional as F

from longrope import ops
from longrope._native import _C

CHUNK = 512  # rows of the chunked torch form, whose logits then fit a large cache


def naive(hidden, weight, targets):
    """Compute the logits, then their cross-entropy: what a model's loss does."""
    return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")


def chunked(hidden, weight, targets):
    """Do the same a block of rows at a time, in plain torch."""
    parts = zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True)
    return torch.cat([naive(h, weight, t) for h, t in parts])


def setup(rows, embed, vocab, dtype, device):
    """Return inputs like those of a model, logits of a few units, made without temporaries."""
    hidden = torch.randn(rows, embed, device=device, dtype=dtype)
    weight = torch.randn(vocab, embed, device=device, dtype=dtype).mul_(2 / embed**0.5)
    return hidden, weight, torch.randint(0, vocab, (rows,), device=device)


def forward(hidden, weight, targets):
    """Return named implementations, the first one the floor, checked on some rows."""
    some = slice(0, 64)
    exact = ops.reference.linear_nll(hidden[some], weight, targets[some])
    error = {
        f.__name__: (f(hidden[some], weight, targets[some]) - exact).abs().max().item()
        for f in (naive, ops.linear_nll)
    }
    print(f"\nlargest error: {error}")
    assert error["linear_nll"] <= 2 * error["naive"] + 1e-5
    return {
        "hidden @ weight.T": lambda: hidden @ weight.T,
        "cross_entropy(logits)": lambda: naive(hidden, weight, targets),
        "cross_entropy by chunks of rows": lambda: chunked(hidden, weight, targets),
        "ops.linear_nll": lambda: ops.linear_nll(hidden, weight, targets),
    }


def training(hidden, weight, targets, frozen):
    """Return named implementations of a forward and a backward."""
    hidden = hidden.clone().requires_grad_()
    weight = weight.clone().requires_grad_(not frozen)
    inputs = (hidden,) if frozen else (hidden, weight)

    def step(function):
        return lambda: torch.autograd.grad(function(hidden, weight, targets).sum(), inputs)

    return {
        "cross_entropy(logits)": step(naive),
        "ops.linear_nll": step(ops.linear_nll),
    }


#: What memory is measured of, and whether hidden and weight ask for gradients then.
PASSES = {
    "forward": (False, False),
    "forward and backward, frozen head": (True, False),
    "forward and backward": (True, True),
}


def peak_memory(function, passes, shape, dtype):
    """Return MiB above the inputs, from a fresh process (called below as a script)."""
    command = [sys.executable, __file__, "--peak", function, passes, dtype]
    command += [str(n) for n in shape]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def print_peak(function, passes, dtype, *shape):
    """Run one call and print by how much it raised the process's peak, in MiB."""
    import resource

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

    function = {"naive": naive, "linear_nll": ops.linear_nll}[function]
    dtype, asked = getattr(torch, dtype), PASSES[passes]

    def step(rows, embed, vocab):
        inputs = setup(rows, embed, vocab, dtype, "cpu")
        before = peak()
        for tensor, asks in zip(inputs, asked, strict=False):
            tensor.requires_grad_(asks)
        nll = function(*inputs)
        if any(asked):
            nll.sum().backward()
        return peak() - before

    step(64, 64, 64)  # what libraries allocate once
    print(step(*(int(n) for n in shape)))


def memory(case, shape, dtype, args):
    """Print and, if asked, save the peaks."""
    for kind in PASSES:
        peaks = {f: peak_memory(f, kind, shape, dtype) for f in ("naive", "linear_nll")}
        ratio = peaks["naive"] / peaks["linear_nll"]
        print(f"\npeak memory, {kind}, {case} {dtype}: {peaks} MiB, {ratio:.1f} times less")
        row = {
            "op": f"linear_nll peak memory, {kind}", "case": case, "dtype": dtype,
            "rate_unit": "MiB", "isa": _C.isa(), **where(),
        }  # fmt: skip
        if args.save:
            rows = [
                {**row, "implementation": f, "rate": f"{p:.1f}", "milliseconds": "",
                 "ratio_to_baseline": f"{peaks['naive'] / p:.3f}"}
                for f, p in peaks.items()
            ]  # fmt: skip
            save(rows, args.device)


def main():
    """Time every shape."""
    p = parser(__doc__)
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    p.add_argument(
        "--shape", type=int, nargs=3, metavar=("T", "E", "V"), default=(4096, 1024, 32000)
    )
    p.add_argument("--only", choices=["forward", "training", "memory"])
    p.add_argument(
        "--chunk", type=int, nargs=2, metavar=("ROWS", "COLUMNS"),
        help="on CUDA: the logits that exist at a time, in place of what is built in",
    )  # fmt: skip
    args = p.parse_args()
    if args.chunk:
        _C.set_nll_chunks(*args.chunk)
    shape = (256, 256, 8000) if args.quick else tuple(args.shape)
    rows, embed, vocab = shape
    case = f"T {rows}, E {embed}, V {vocab}"
    gigaflop = 2 * rows * embed * vocab / 1e9
    for dtype in args.dtype or ["float32", "bfloat16"]:
        inputs = setup(*shape, getattr(torch, dtype), args.device)
        if args.only in (None, "forward"):
            compare("linear_nll", case, dtype, forward(*inputs), args, gigaflop, "GFLOP/s")
        for frozen in (True, False):
            if args.only in (None, "training"):
                op = f"linear_nll with backward, {'frozen' if frozen else 'trained'} head"
                work = gigaflop * (2 if frozen else 3)  # products that the usual way needs
                steps = training(*inputs, frozen)
                compare(op, case, dtype, steps, args, work, "GFLOP/s")
        # Small shapes stay below what a process's peak shows.
        if args.only in (None, "memory") and args.device == "cpu" and not args.quick:
            memory(case, shape, dtype, args)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--peak"]:
        print_peak(*sys.argv[2:])
    else:
        main()
