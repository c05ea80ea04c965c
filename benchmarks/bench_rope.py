"""ops.rope, ops.rope_ and ops.rerotate beside clones, copies and transformers' implementation.

The floor of an op that returns fresh tensors is `(q.clone(), k.clone())`; of one that works in
place, `copy_` of the same bytes. Rates count the bytes that must move, read and written: q and k,
or the keys alone.
"""

from __future__ import annotations

import torch
from harness import compare, parser

from longrope import RescaleFactors, ops


def hugging_face(q, k, cos, sin):
    """Call transformers' own function (bfloat16 cos and sin, as its models pass them)."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    return apply_rotary_pos_emb(q, k, cos, sin)


def setup(heads, key_heads, tokens, head_dim, dtype, device, token_major=False):
    """Return named implementations of one shape, checked against the reference."""

    def tensor(count):
        if token_major:
            return torch.randn(1, tokens, count, head_dim, device=device).to(dtype).transpose(1, 2)
        return torch.randn(1, count, tokens, head_dim, device=device).to(dtype)

    q, k = tensor(heads), tensor(key_heads)
    positions = torch.arange(tokens, device=device)
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device)
    inv_freq = 10000.0 ** -(pairs / head_dim)
    by_head = inv_freq.repeat(1, key_heads, 1)
    angles = (positions[:, None] * inv_freq).repeat(1, 2)[None]
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q_turn, k_turn = q.clone(), k.clone()
    compiled = torch.compile(hugging_face)
    implementations = {
        "(q.clone(), k.clone())": lambda: (q.clone(), k.clone()),
        "copy_": lambda: (q_out.copy_(q), k_out.copy_(k)),
        "transformers eager": lambda: hugging_face(q, k, cos, sin),
        "transformers compiled": lambda: compiled(q, k, cos, sin),
        "ops.rope": lambda: ops.rope(q, k, positions, inv_freq),
        "ops.rope_": lambda: ops.rope_(q_turn, k_turn, positions, inv_freq),
        "ops.rope, by head": lambda: ops.rope(q, k, positions, by_head),
        "ops.rope_, by head": lambda: ops.rope_(q_turn, k_turn, positions, by_head),
    }
    check(q, k, positions, inv_freq, implementations)
    return implementations, 2 * (q.nbytes + k.nbytes) / 1e9


def check(q, k, positions, inv_freq, implementations):
    """Compare what is timed with the reference on a slice of the tokens."""
    some = slice(0, 64)
    expected = ops.reference.rope(q[:, :, some], k[:, :, some], positions[some], inv_freq)
    for name in ("transformers eager", "transformers compiled", "ops.rope", "ops.rope_"):
        for got, right in zip(implementations[name](), expected, strict=True):
            # transformers rounds cos and sin to the dtype of q, so its error is a few roundings.
            tolerance = 8 * torch.finfo(q.dtype).eps
            torch.testing.assert_close(got[:, :, some], right, rtol=tolerance, atol=tolerance)


def rerotation(heads, tokens, head_dim, dtype, device):
    """Return named implementations of keys that go from one set of factors to another."""
    sizes = {"original_length": 4096, "target_length": 32768, "rope_theta": 1e4}
    pi, yarn = (
        make(**sizes, rotary_dim=head_dim) for make in (RescaleFactors.pi, RescaleFactors.yarn)
    )
    k = torch.randn(1, heads, tokens, head_dim, device=device).to(dtype)
    out, turned = torch.empty_like(k), k.clone()
    positions = torch.arange(tokens, device=device)
    expected = ops.reference.rerotate(k[:, :, :64], positions[:64], pi, yarn)
    tolerance = 8 * torch.finfo(dtype).eps
    for got in (ops.rerotate(k, positions, pi, yarn),
                ops.rerotate(turned, positions, pi, yarn, out=turned)):  # fmt: skip
        torch.testing.assert_close(got[:, :, :64], expected, rtol=tolerance, atol=tolerance)
    there_and_back = [(pi, yarn), (yarn, pi)]  # its attention factor would grow without end

    def in_place():
        there_and_back.reverse()
        return ops.rerotate(turned, positions, *there_and_back[0], out=turned)

    implementations = {
        "copy_": lambda: out.copy_(k),
        "k.clone()": lambda: k.clone(),
        "ops.rerotate": lambda: ops.rerotate(k, positions, pi, yarn),
        "ops.rerotate in place": in_place,
    }
    return implementations, 2 * k.nbytes / 1e9


def main():
    """Time every shape."""
    p = parser(__doc__)
    p.add_argument("--only", choices=["rope", "rerotate"])
    p.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"])
    p.add_argument("--tokens", type=int, default=8192)
    args = p.parse_args()
    tokens = 512 if args.quick else args.tokens
    for name in args.dtype or ["float32", "bfloat16"]:
        dtype = getattr(torch, name)
        for token_major in (False, True) if args.only != "rerotate" else ():
            order = "B,N,H,D" if token_major else "B,H,N,D"
            implementations, gigabytes = setup(32, 8, tokens, 128, dtype, args.device, token_major)
            case = f"q[1,32,{tokens},128] k[1,8,{tokens},128] {order}"
            compare("rope", case, name, implementations, args, gigabytes, "GB/s")
        if args.only != "rope":
            implementations, gigabytes = rerotation(8, 2 * tokens, 128, dtype, args.device)
            case = f"k[1,8,{2 * tokens},128] B,H,N,D"
            compare("rerotate", case, name, implementations, args, gigabytes, "GB/s")


if __name__ == "__main__":
    main()
