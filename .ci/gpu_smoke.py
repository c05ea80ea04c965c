"""Every op, dtype and class of shapes once on a device, against float64: seconds, no pytest.

`python .ci/gpu_smoke.py [--device cuda|cpu] [--small]`: forward and backward, twice, whose bits
must agree; the norm of the error over that of the reference stays under what the dtype allows, NaN
never passes. A line for each case is printed the moment it is known. `--small` is for
compute-sanitizer, which slows kernels a hundredfold; `--large` runs the three main kernels alone,
for a profiler.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator

import torch

from longrope import _C, ops

#: Largest ||error|| / ||reference||: some roundings of inputs and intermediate results.
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}

Case = tuple[str, Callable, Callable, list[torch.Tensor], dict]


def inv_freq(pairs: int, scale: float = 1.0) -> torch.Tensor:
    return 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs) / scale


def rope_cases(tokens: int) -> Iterator[Case]:
    for head_dim, rotary, interleaved in ((128, 128, False), (64, 32, True), (80, 80, False)):
        q, k = torch.randn(2, 6, tokens, head_dim), torch.randn(2, 2, tokens, head_dim)
        at = torch.arange(tokens) + 2**21
        more = {"interleaved": interleaved, "start_tokens": 2**21 + 5}
        more |= {"base_inv_freq": inv_freq(rotary // 2), "attention_factor": 1.1}
        arguments = {"positions": at, "inv_freq": inv_freq(rotary // 2, 4), **more}
        name = f"rope D {head_dim}, R {rotary}{', interleaved' * interleaved}"
        yield name, ops.rope, ops.reference.rope, [q, k], arguments
        if not interleaved:  # in place: on copies, for inputs stay as they are
            yield f"{name}, in place", _in_place, ops.reference.rope, [q, k], arguments


def _in_place(q: torch.Tensor, k: torch.Tensor, **arguments) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return ops.rope_(q.clone(), k.clone(), **arguments)


def attention_cases(tokens: int) -> Iterator[Case]:
    def made(heads, kv_heads, queries, keys, head_dim):
        shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
        return [torch.randn(2, h, n, head_dim) for h, n in shapes]

    yield from (
        (f"attention {name}", ops.attention, ops.reference.attention, inputs, arguments)
        for name, inputs, arguments in (
            ("D 64", made(4, 4, tokens, tokens, 64), {}),
            ("D 128, GQA 4", made(8, 2, tokens, tokens, 128), {}),
            ("D 96, window", made(4, 2, tokens, tokens, 96), {"window": tokens // 3}),
            ("D 256, softcap", made(2, 1, tokens, tokens, 256), {"softcap": 3.0}),
            ("D 80, 5 queries on more keys", made(8, 2, 5, tokens + 37, 80), {}),
            ("D 128, 1 query", made(8, 2, 1, 8 * tokens, 128), {}),
            ("D 128, not causal", made(4, 2, 33, tokens, 128), {"causal": False}),
            (
                "D 128, padded rows",
                made(4, 2, tokens, tokens, 128),
                {
                    "key_start": torch.tensor([0, 7]),
                    "key_length": torch.tensor([tokens - 9, tokens]),
                },
            ),
        )
    )
    q, k, v = made(8, 2, tokens, tokens, 128)
    at = torch.arange(tokens)
    tiers = {"limits": torch.tensor([tokens // 2, tokens])}
    for name, frequencies, more in (
        ("rotation", inv_freq(64, 4), {}),
        ("tiers", torch.stack([inv_freq(64), inv_freq(64, 4)]), tiers),
    ):
        for queries in (tokens, 1):  # one: by the kernel for few rows, where keys turn
            rotation = {"inv_freq": frequencies, "query_positions": at[-queries:], **more}
            yield (
                f"attention D 128, {name}{', 1 query' * (queries == 1)}",
                _rotated(ops),
                _rotated(ops.reference),
                [q[:, :, -queries:], k, v],
                rotation | {"key_positions": at},
            )


def _rotated(module) -> Callable:
    def call(q, k, v, **rotation):
        return module.attention(q, k, v, rotation=ops.Rotation(**rotation))

    return call


def nll_cases(tokens: int) -> Iterator[Case]:
    for embed, vocab, softcap in ((64, 1000, None), (320, 4099, 30.0)):
        hidden, weight = torch.randn(tokens, embed), torch.randn(vocab, embed) / embed**0.5
        targets = torch.randint(0, vocab, (tokens,))
        targets[::7] = -100
        arguments = {"targets": targets, "softcap": softcap}
        name = f"linear_nll E {embed}, V {vocab}"
        yield name, ops.linear_nll, ops.reference.linear_nll, [hidden, weight], arguments
        frozen = {"weight": weight, **arguments}
        yield f"{name}, frozen head", _frozen(ops), _frozen(ops.reference), [hidden], frozen


def _frozen(module) -> Callable:
    def call(hidden, weight, **arguments):
        return module.linear_nll(hidden, weight.to(hidden), **arguments)

    return call


def results(function: Callable, inputs: list, arguments: dict, grads: list | None) -> list:
    """Return the outputs and the gradients of `function`, as float64 on the CPU."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves, **arguments)
    outs = list(out) if isinstance(out, tuple) else [out]
    found = [o.detach() for o in outs]
    if outs[0].requires_grad:
        if not grads:
            generator = torch.Generator().manual_seed(1)
            grads += [torch.randn(o.shape, generator=generator) for o in outs]
        found += torch.autograd.grad(
            outs, leaves, [g.to(o) for g, o in zip(grads, outs, strict=True)]
        )
    return [x.cpu() for x in found]


def check(case: Case, dtype: torch.dtype, device: str) -> str:
    """Return what is wrong with a case, or nothing."""
    function, reference, inputs, arguments = case[1:]
    low = [x.to(dtype) for x in inputs]
    there = {n: a.to(device) if torch.is_tensor(a) else a for n, a in arguments.items()}
    grads: list = []
    exact = results(reference, [x.double() for x in low], arguments, grads)
    once, again = (results(function, [x.to(device) for x in low], there, grads) for _ in range(2))
    if not all(torch.equal(a, b) for a, b in zip(once, again, strict=True)):
        return "two runs differ in their bits"
    for got, right in zip(once, exact, strict=False):  # in place: without gradients
        error = (got.double() - right).norm() / right.norm().clamp(min=1e-30)
        if not error <= TOLERANCE[dtype]:
            return f"||error|| / ||reference|| is {error:.2e}"
    return ""


def large(device: str) -> None:
    """Run the three main kernels at sizes that fill a GPU, a few times."""
    q, k, v = (torch.randn(1, 16, 8192, 128, device=device).bfloat16() for _ in range(3))
    hidden, weight = (torch.randn(n, 4096, device=device).bfloat16() for n in (4096, 32000))
    targets = torch.randint(0, 32000, (4096,), device=device)
    at, frequencies = torch.arange(8192, device=device), inv_freq(64).to(device)
    for _ in range(3):
        ops.attention(q, k, v)
        ops.rope(q, k, at, frequencies)
        ops.linear_nll(hidden, weight, targets)


def main() -> int:
    """Print a line for every case; the exit status says whether all passed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to rehearse")
    parser.add_argument("--small", action="store_true", help="for compute-sanitizer")
    parser.add_argument("--large", action="store_true", help="for a profiler")
    args = parser.parse_args()
    if args.large:
        large(args.device)
        return 0
    tokens, failed, before = 40 if args.small else 300, 0, _C.cuda_launches()
    dtypes = (torch.float32, torch.bfloat16) if args.small else tuple(TOLERANCE)
    for dtype in dtypes:
        torch.manual_seed(0)
        for case in (*rope_cases(tokens), *attention_cases(tokens), *nll_cases(tokens)):
            began = time.perf_counter()
            wrong = check(case, dtype, args.device)
            took = 1e3 * (time.perf_counter() - began)
            failed += bool(wrong)
            shown = str(dtype).removeprefix("torch.")
            print(f"{wrong or 'ok':40s} {case[0]:44s} {shown:9s} {took:7.0f} ms", flush=True)
    if args.device == "cuda" and _C.cuda_launches() == before:
        sys.exit("gpu_smoke: no kernel of ours ran on the GPU")
    print("failed:", failed, flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
