"""torch.ops.longrope.attention and its relatives over the emulated kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_int, c_int64, c_void_p

import torch

from emulation.library import DTYPES, call, fresh, poisoned


class AttentionTensor(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [
        ("data", c_void_p),
        *((name, c_int64) for name in ("batch_stride", "head_stride", "token_stride")),
    ]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> AttentionTensor:
        """Describe `tensor`."""
        return cls(tensor.data_ptr(), *tensor.stride()[:3])


class AttentionMergeParams(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [
        *((name, AttentionTensor) for name in ("out_a", "out_b", "out")),
        *((name, c_void_p) for name in ("lse_a", "lse_b", "lse")),
        ("dtype", c_int),
        *((name, c_int64) for name in ("batch", "heads", "queries", "head_dim")),
    ]


def merge_attention(out_a, lse_a, out_b, lse_b):
    """longrope::merge_attention."""
    lse_a, lse_b = lse_a.contiguous(), lse_b.contiguous()
    out, lse = fresh(out_a), poisoned(tuple(lse_a.shape), lse_a.dtype)
    params = AttentionMergeParams(
        *map(AttentionTensor.of, (out_a, out_b, out)),
        *(t.data_ptr() for t in (lse_a, lse_b, lse)),
        DTYPES[out_a.dtype],
        *out_a.shape,
    )
    call("emulated_attention_merge", params, (out, lse))
    return out, lse


IMPLEMENTATIONS = {f.__name__: f for f in (merge_attention,)}
