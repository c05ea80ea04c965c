"""torch.ops.longrope.attention and its relatives over the emulated kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p

import torch

from emulation import rope
from emulation.library import DTYPES, call, check_layout, fresh, poisoned, runtime
from emulation.rope import RopeParams


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


class AttentionBound(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [("rows", c_void_p), ("all", c_int64)]


class AttentionRotation(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [("q", RopeParams), ("k", RopeParams), ("limits", c_void_p)]


#: As they follow one another in the struct and, each as an int and a tensor, among the arguments.
BOUNDS = ("query_start", "key_start", "key_length", "query_begin", "query_end")

OPTIONS = 1 + 2 * len(BOUNDS) + 3  # causal, the bounds, and window, scale and softcap


class AttentionParams(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [
        *((name, AttentionTensor) for name in ("q", "k", "v", "out")),
        ("lse", c_void_p),
        ("dtype", c_int),
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "queries", "keys", "head_dim")),
        *((name, AttentionBound) for name in BOUNDS),
        ("causal", c_bool),
        ("window", c_int64),
        ("scale", c_double),
        ("softcap", c_double),
        ("rotation", ctypes.POINTER(AttentionRotation)),
        ("tiers", c_void_p),
        ("bfloat16_product", c_void_p),
    ]


class AttentionBackwardParams(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [
        ("forward", AttentionParams),
        ("grad_out", AttentionTensor),
        ("grad_lse", c_void_p),
        *((name, AttentionTensor) for name in ("grad_q", "grad_k", "grad_v")),
    ]


class AttentionMergeParams(ctypes.Structure):
    """As csrc/attention/attention.h says."""

    _fields_ = [
        *((name, AttentionTensor) for name in ("out_a", "out_b", "out")),
        *((name, c_void_p) for name in ("lse_a", "lse_b", "lse")),
        ("dtype", c_int),
        *((name, c_int64) for name in ("batch", "heads", "queries", "head_dim")),
    ]


def params_of(held, q, k, v, causal, *options):
    """Fill in everything but the outputs and the rotation; `held` keeps what they point to."""
    *options, window, scale, softcap = options
    bounds = {}
    for name, all_rows, rows in zip(BOUNDS, options[::2], options[1::2], strict=True):
        held.append(None if rows is None else rows.contiguous())
        bounds[name] = AttentionBound(None if rows is None else held[-1].data_ptr(), all_rows)
    held += [q, k, v]
    return AttentionParams(
        q=AttentionTensor.of(q), k=AttentionTensor.of(k), v=AttentionTensor.of(v),
        dtype=DTYPES[q.dtype], batch=q.shape[0], heads=q.shape[1], kv_heads=k.shape[1],
        queries=q.shape[2], keys=k.shape[2], head_dim=q.shape[3],
        causal=causal, window=window, scale=scale, softcap=softcap, **bounds,
    )  # fmt: skip


def rotation_of(
    held, q, k, query_positions, key_positions, limits, inv_freq, base, start, start_tiers, factor,
    factor_tiers, interleaved,
):  # fmt: skip
    """Describe how queries and keys turn."""

    def turn(x, positions):
        p = rope.params_of(
            held, x, x[:, :0], positions, interleaved, factor, None, inv_freq.shape[-1]
        )
        p.turn = rope.tiered(held, p, inv_freq, base, start, start_tiers, factor_tiers)
        return p

    rotation = AttentionRotation(turn(q, query_positions), turn(k, key_positions))
    if limits is not None:
        held.append(limits.contiguous())
        rotation.limits = held[-1].data_ptr()
    return rotation


def workspace_of(name, params):
    """Ask how many bytes the kernels need beside their arguments."""
    function = getattr(runtime().library, name)
    function.restype = c_int64
    return function(ctypes.byref(params))


def attend(held, p, q):
    """Run the forward pass."""
    out, lse = fresh(q), poisoned(tuple(q.shape[:3]), torch.float32)
    p.out, p.lse = AttentionTensor.of(out), lse.data_ptr()
    workspace = workspace_of("emulated_attention_workspace", p)
    call("emulated_attention", p, (out, lse), max(workspace, 1))
    return out, lse


def attention(q, k, v, *options):
    """longrope::attention."""
    held = []
    return attend(held, params_of(held, q, k, v, *options), q)


def attention_rotated(q, k, v, *arguments):
    """longrope::attention_rotated."""
    held = []
    options, turned_by = arguments[:OPTIONS], arguments[OPTIONS:]
    p = params_of(held, q, k, v, *options)
    rotation = rotation_of(held, q, k, *turned_by)
    check_layout(AttentionRotation)
    p.rotation = ctypes.pointer(rotation)
    return attend(held, p, q)


def attention_backward(grad_out, grad_lse, q, k, v, out, lse, *options):
    """longrope::attention_backward."""
    held = [out, lse.contiguous(), None if grad_lse is None else grad_lse.contiguous()]
    p = params_of(held, q, k, v, *options)
    p.out, p.lse = AttentionTensor.of(out), held[1].data_ptr()
    grads = fresh(q), fresh(k), fresh(v)
    params = AttentionBackwardParams(
        p, AttentionTensor.of(grad_out), None if grad_lse is None else held[2].data_ptr(),
        *map(AttentionTensor.of, grads),
    )  # fmt: skip
    if 0 in (grads[0].numel(), grads[1].numel()):  # as csrc/bindings/attention.cpp does
        return tuple(grad.zero_() for grad in grads)
    workspace = workspace_of("emulated_attention_backward_workspace", params)
    call("emulated_attention_backward", params, grads, workspace)
    return grads


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


IMPLEMENTATIONS = {
    f.__name__: f for f in (attention, attention_rotated, attention_backward, merge_attention)
}
