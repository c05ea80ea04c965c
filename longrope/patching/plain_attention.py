"""Attention of queries and keys that are turned already: by our kernels, or by torch's.

On a GPU a model goes through the kernel that is measured to be faster. `AHEAD` says where that is
ours; elsewhere `torch.nn.functional.scaled_dot_product_attention` attends wherever it computes the
same. What it cannot do (a window, a softcap, rows with bounds, rotation inside) is ours everywhere.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from longrope import ops
from longrope._native import _C
from longrope.patching.torch_attention import HALVES, attend_unmasked


class Measured(NamedTuple):
    """Up to which head_dim our kernels are ahead of what torch runs, forward and with gradients.

    Of a whole tile of queries; for fewer torch's are. `gradients_behind`: of queries that stand
    behind some of the keys, for which torch has flash's kernels alone, forward and backward.
    """

    forward: int
    with_gradients: int
    gradients_behind: int


#: By compute capability, in 16 bits: rows of `benchmarks/bench_attention.py` in
#: `benchmarks/results/nvidia-h100-80gb-hbm3.csv`: forward 1.07 to 1.14 times as fast as what torch
#: chooses (cuDNN), with gradients 0.34 to 0.94 times; with gradients 1.4 to 1.8 times as fast as
#: flash to head_dim 128, of whole sequences: behind other keys that is concluded, not timed. In
#: float32 our CUDA kernels are correct and plain, not fast.
AHEAD = {(9, 0): Measured(forward=256, with_gradients=0, gradients_behind=128)}
#: What `csrc/attention/cuda/attention.cu` takes its kernels of 9.0 for: queries that fill a tile,
#: and tiles that fill half of the chip; of keys, for gradients.
TILE, TILES = 128, 66


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attend as `ops.attention` does, whose arguments these are, by whichever kernel is faster.

    Queries `[B, H, N, D]` are the last `N` of the positions of keys and values `[B, Hk, M, D]`;
    returns `[B, H, N, D]`.
    """
    if takes_torch(query, key, value, causal=causal, window=window, softcap=softcap):
        return attend_unmasked(query, key, value, causal, scale)
    return ops.attention(
        query, key, value, causal=causal, window=window, scale=scale, softcap=softcap
    )


def takes_torch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    causal: bool = True,
    window: int | None = None,
    softcap: float | None = None,
) -> bool:
    """Say whether `attend` goes through torch's kernels; of the tensors only shapes count."""
    torch_can = query.is_cuda and window is None and softcap is None
    if not torch_can or not _is_plain(query, key, causal):
        return False
    return not _is_ahead(query, key, value, causal)


def _is_plain(query: Tensor, key: Tensor, causal: bool) -> bool:
    """Say whether torch computes the same without a mask in memory, which shuts its kernels out.

    Compiled it needs one for some queries on a cache (`attend_unmasked`); queries that stand before
    the first key are NaN there and 0 here.
    """
    count, total = query.shape[-2], key.shape[-2]
    if not causal or count == 1 or count == total:
        return True
    return count < total and not torch.compiler.is_compiling()


def _is_ahead(query: Tensor, key: Tensor, value: Tensor, causal: bool = True) -> bool:
    """Say whether to take our kernel for these: it is measured to be faster, or reads far less."""
    batch, heads, count, head_dim = query.shape
    kv_heads, total = key.shape[1:3]
    if query.dtype not in HALVES:
        # torch copies keys that heads share, ours reads them once: what a few queries wait for.
        return count < TILE and heads > kv_heads
    if count < TILE or batch * heads * -(-count // TILE) < TILES or not _has_wgmma():
        return False
    none = Measured(0, 0, 0)
    ahead = AHEAD.get(torch.cuda.get_device_capability(query.device), none)
    if not (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))):
        return head_dim <= ahead.forward
    if not causal or count == total:
        return head_dim <= ahead.with_gradients
    return batch * kv_heads * -(-total // TILE) >= TILES and head_dim <= ahead.gradients_behind


@functools.cache
def _has_wgmma() -> bool:
    """Say whether this build has the kernels of compute capability 9.0."""
    return _C.build_info()["wgmma"]
