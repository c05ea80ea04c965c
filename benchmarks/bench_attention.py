"""ops.attention beside torch's scaled_dot_product_attention: causal, and a chunk on a long cache.

On CUDA beside each of its backends that takes the inputs (flash, cuDNN, memory-efficient), also
for decoding, and forward with backward. Decoding on CPU (`--only decode`): decode.py.
Rates count the operations that a causal mask leaves: 4 * head_dim for each visible (query, key).
"""

from __future__ import annotations

import decode
import torch
from harness import compare, parser
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longrope import ops
from longrope._native import _C

BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "memory-efficient": SDPBackend.EFFICIENT_ATTENTION,
}


def by_backend(function):
    """Return `function` as torch runs it, and under each SDPA backend that takes these inputs."""

    def under(backend):
        def call():
            with sdpa_kernel(backend):
                return function()

        return call

    named = {"torch SDPA": function}
    for name, backend in BACKENDS.items():
        try:
            under(backend)()
        except RuntimeError:
            print(f"torch SDPA, {name}: not for these inputs")
        else:
            named[f"torch SDPA, {name}"] = under(backend)
    return named


def torch_attention(q, k, v):
    """Return torch's own implementations by name: causal, aligned to the last key."""
    grouped = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    queries, keys = q.shape[2], k.shape[2]
    if queries == keys or queries == 1:
        causal = {"is_causal": queries > 1}
        call, name = (lambda: sdpa(q, k, v, **causal, **grouped)), "torch SDPA, is_causal"
    elif q.is_cuda:  # a mask of its own would shut out flash
        bias = causal_lower_right(queries, keys)
        call, name = (lambda: sdpa(q, k, v, attn_mask=bias, **grouped)), "torch SDPA, lower right"
    else:
        ones = torch.ones(queries, keys, dtype=torch.bool, device=q.device)
        mask = ones.tril(keys - queries)
        call, name = (lambda: sdpa(q, k, v, attn_mask=mask, **grouped)), "torch SDPA, mask"
    return by_backend(call) if q.is_cuda else {name: call}


def by_kernel(q, function):
    """Return `function`, which calls ops.attention, under each choice of the CUDA kernel, by name.

    Chips before 9.0 have mma.sync alone; on those of 9.0 it is timed beside wgmma.
    """

    def by_mma():
        before = _C.cuda_attention()
        _C.set_cuda_attention("mma")
        try:
            return function()
        finally:
            _C.set_cuda_attention(before)

    named = {"ops.attention": function}
    if q.is_cuda and q.shape[2] > 16 and torch.cuda.get_device_capability() == (9, 0):
        named["ops.attention, mma.sync"] = by_mma
    return named


def setup(heads, kv_heads, queries, keys, head_dim, dtype, device):
    """Return named implementations, the first the baseline, checked against each other."""
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(1, h, n, head_dim, device=device).to(dtype) for h, n in shapes)
    named = torch_attention(q, k, v) | by_kernel(q, lambda: ops.attention(q, k, v))
    results = {name: f().float() for name, f in named.items()}
    right = next(iter(results.values()))
    error = max((right - results[n]).abs().max().item() for n in results if n.startswith("ops."))
    print(f"\nlargest difference: {error:.2e}")
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)
    return named


def with_backward(heads, kv_heads, queries, head_dim, dtype, device):
    """Return the same as a training step's forward and backward, causal."""
    shapes = ((heads, queries), (kv_heads, queries), (kv_heads, queries))
    inputs = [
        torch.randn(1, h, n, head_dim, device=device).to(dtype).requires_grad_() for h, n in shapes
    ]

    def step(attend):
        return lambda: torch.autograd.grad(attend().float().square().sum(), inputs)

    theirs = {name: step(attend) for name, attend in torch_attention(*inputs).items()}
    return theirs | by_kernel(inputs[0], step(lambda: ops.attention(*inputs)))


def decoding(args):
    """Time decoding on CPU by its rate of reading keys and values."""
    for case in decode.CASES:
        batch, heads, kv_heads, queries, keys, head_dim = case
        keys = keys // 8 if args.quick else keys
        case = batch, heads, kv_heads, queries, keys, head_dim
        label = f"B {batch}, H {heads}, Hk {kv_heads}, N {queries}, M {keys}, D {head_dim}"
        if args.case and args.case not in label:
            continue
        for name in args.dtype or ["float32", "bfloat16", "float16"]:
            dtype = getattr(torch, name)
            named = decode.implementations(case, dtype, args.peer or decode.PEERS)
            compare(
                "decode", label, name, named, args, decode.gigabytes(case, dtype), "GB/s"
            )  # fmt: skip


def main():
    """Time every shape."""
    p = parser(__doc__)
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--only", choices=["forward", "backward", "decode"])
    p.add_argument("--case", help="decoding: only cases with this in their name, as 'Hk 8, N 1'")
    p.add_argument("--peer", action="append", choices=decode.PEERS, help="decoding: only these")
    args = p.parse_args()
    cuda = args.device == "cuda"
    if args.only == "decode" and not cuda:
        return decoding(args)
    small = 8 if args.quick else 1
    long, cache = (16384, 131072) if cuda else (4096, 16384)
    shapes = [(8, 8, long // small, long // small, 128), (8, 2, 512 // small, cache // small, 128)]
    if cuda:
        shapes += [(8, 8, long // small, long // small, d) for d in (64, 256)]
        shapes += [(32, 8, 1, cache // small, 128)]
    dtypes = args.dtype or (["bfloat16"] if cuda else ["float32", "bfloat16"])
    for heads, kv_heads, queries, keys, head_dim in shapes:
        visible = queries * keys - queries * (queries - 1) / 2
        gigaflop = 4 * head_dim * heads * visible / 1e9
        case = f"H {heads}, Hk {kv_heads}, N {queries}, M {keys}, D {head_dim}"
        for dtype in dtypes:
            shape = heads, kv_heads, queries, keys, head_dim, getattr(torch, dtype), args.device
            if args.only in (None, "forward"):
                compare("attention", case, dtype, setup(*shape), args, gigaflop, "GFLOP/s")
            if args.only in (None, "backward") and queries == keys:
                # Five products in the backward beside the two of the forward.
                named = with_backward(heads, kv_heads, queries, head_dim, *shape[-2:])
                op = "attention with backward"
                compare(op, case, dtype, named, args, 3.5 * gigaflop, "GFLOP/s")


if __name__ == "__main__":
    main()
