"""What a GPU gives at most, as rows beside our own: a device-to-device copy and a large product.

`python .ci/gpu_ceilings.py --csv FILE [--device cuda|cpu]`: GB/s of bytes read and written, and
GFLOP/s of a bf16 product of 8192 x 8192 matrices, by `benchmarks/harness.py`.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
from harness import compare, parser


def main() -> None:
    """Time both."""
    args = parser(__doc__.splitlines()[0]).parse_args()
    size, side = (2**20, 256) if args.quick else (2**31, 8192)
    source = torch.empty(size, dtype=torch.uint8, device=args.device).random_(0, 256)
    target = torch.empty_like(source)
    named = {"copy_": lambda: target.copy_(source)}
    compare("ceiling", f"{size} bytes", "uint8", named, args, 2 * size / 1e9, "GB/s")
    a, b = (torch.randn(side, side, device=args.device).bfloat16() for _ in range(2))
    named = {"matmul": lambda: a @ b}
    case = f"{side} x {side} x {side}"
    compare("ceiling", case, "bfloat16", named, args, 2 * side**3 / 1e9, "GFLOP/s")


if __name__ == "__main__":
    main()
