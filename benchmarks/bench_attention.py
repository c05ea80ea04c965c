"""ops.attention beside torch's scaled_dot_product_attention: causal, and a chunk on a long cache.

Rates count the operations that a causal mask leaves: 4 * head_dim for each visible (query, key).
"""

from __future__ import annotations

import torch
from harness import compare, parser
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longrope import ops


def setup(heads, kv_heads, queries, keys, head_dim, dtype, device):
    """Return named implementations, the first the baseline, checked against each other."""
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    q, k, v = (torch.randn(1, h, n, head_dim, device=device).to(dtype) for h, n in shapes)
    grouped = {"enable_gqa": True} if kv_heads < heads else {}
    if queries == keys:
        named = {"torch SDPA, is_causal": lambda: sdpa(q, k, v, is_causal=True, **grouped)}
    else:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
        named = {"torch SDPA, mask": lambda: sdpa(q, k, v, attn_mask=mask, **grouped)}
    named["ops.attention"] = lambda: ops.attention(q, k, v)
    results = [f().float() for f in named.values()]
    error = (results[0] - results[1]).abs().max().item()
    print(f"\nlargest difference: {error:.2e}")
    assert error < (1e-4 if dtype == torch.float32 else 5e-2)
    return named


def main():
    """Time every shape."""
    p = parser(__doc__)
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    args = p.parse_args()
    small = 8 if args.quick else 1
    shapes = [(8, 8, 4096 // small, 4096 // small, 128), (8, 2, 512 // small, 16384 // small, 128)]
    for heads, kv_heads, queries, keys, head_dim in shapes:
        visible = queries * keys - queries * (queries - 1) / 2
        gigaflop = 4 * head_dim * heads * visible / 1e9
        case = f"H {heads}, Hk {kv_heads}, N {queries}, M {keys}, D {head_dim}"
        for dtype in args.dtype or ["float32", "bfloat16"]:
            named = setup(
                heads, kv_heads, queries, keys, head_dim, getattr(torch, dtype), args.device
            )
            compare("attention", case, dtype, named, args, gigaflop, "GFLOP/s")


if __name__ == "__main__":
    main()
