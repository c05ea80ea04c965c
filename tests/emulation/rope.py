"""torch.ops.longrope.rope and its relatives over the emulated kernels."""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_double, c_int, c_int64, c_void_p

import torch

from emulation.library import DTYPES, Heads, call, fresh, poisoned, runtime


class RopeFrequencies(ctypes.Structure):
    """As csrc/rope/rope.h says."""

    _fields_ = [
        ("inv_freq", c_void_p),
        ("base_inv_freq", c_void_p),
        ("inv_freq_stride", c_int64),
        ("inv_freq_group_stride", c_int64),
        ("base_inv_freq_stride", c_int64),
        ("tiers", c_int64),
        ("tier_rows", c_void_p),
        ("start_tokens_rows", c_void_p),
        ("start_tokens_stride", c_int64),
        ("start_tokens", c_int64),
    ]


class RopeParams(ctypes.Structure):
    """As csrc/rope/rope.h says."""

    _fields_ = [
        *((name, Heads) for name in ("q", "k", "q_out", "k_out")),
        ("dtype", c_int),
        *((name, c_int64) for name in ("batch", "tokens", "head_dim", "pairs", "groups")),
        ("interleaved", c_bool),
        ("positions", c_void_p),
        ("positions_batch_stride", c_int64),
        ("positions_token_stride", c_int64),
        ("token_begin_rows", c_void_p),
        ("token_end_rows", c_void_p),
        ("turn", RopeFrequencies),
        ("undo", RopeFrequencies),
        ("attention_factor_rows", c_void_p),
        ("attention_factor_stride", c_int64),
        ("attention_factor_group_stride", c_int64),
        ("attention_factor", c_double),
    ]


class RopeBackwardParams(ctypes.Structure):
    """As csrc/rope/rope.h says."""

    _fields_ = [
        ("forward", RopeParams),
        ("grad_q", Heads),
        ("grad_k", Heads),
        ("partial", c_void_p),
    ]


def group_strides(t):
    """Return the strides of rows and groups, of a contiguous tensor [B or 1, G, ...]."""
    count = t[0, 0].numel()
    return 0 if len(t) == 1 else t.shape[1] * count, count


def groups_of(inv_freq):
    """Return the groups of heads of frequencies without tiers."""
    return inv_freq.shape[1] if inv_freq.dim() == 3 else 1


def frequencies(held, inv_freq, base_inv_freq, start_tokens, start_tokens_rows=None):
    """Describe a factor set; tensors made on the way are appended to `held`."""

    def rows(t):
        held.append(t.contiguous())
        return held[-1].data_ptr(), t.shape[-1] if t.dim() == 2 else 0

    f = RopeFrequencies(start_tokens=start_tokens, tiers=1, start_tokens_stride=1)
    f.inv_freq, f.inv_freq_stride = rows(inv_freq)
    if inv_freq.dim() == 3:
        f.inv_freq_stride, f.inv_freq_group_stride = group_strides(inv_freq)
    if base_inv_freq is not None:
        f.base_inv_freq, f.base_inv_freq_stride = rows(base_inv_freq)
    if start_tokens_rows is not None:
        f.start_tokens_rows, _ = rows(start_tokens_rows)
    return f


def params_of(held, q, k, positions, interleaved, factor, factor_rows, pairs, groups=1):
    """Fill in everything but the outputs and the frequencies."""
    p = RopeParams(
        q=Heads.of(q), k=Heads.of(k), dtype=DTYPES[q.dtype], batch=q.shape[0], tokens=q.shape[2],
        head_dim=q.shape[3], pairs=pairs, groups=groups, interleaved=interleaved,
        positions=positions.data_ptr(),
        positions_token_stride=positions.stride(-1), attention_factor=factor,
        attention_factor_stride=1,
        positions_batch_stride=positions.stride(0) if positions.dim() == 2 else 0,
    )  # fmt: skip
    if factor_rows is not None and factor_rows.dim() == 2:
        held.append(factor_rows.contiguous())
        p.attention_factor_rows = held[-1].data_ptr()
        p.attention_factor_stride, p.attention_factor_group_stride = group_strides(factor_rows)
    elif factor_rows is not None:
        held.append(factor_rows.expand(q.shape[0]).contiguous())
        p.attention_factor_rows = held[-1].data_ptr()
    held += [q, k, positions]
    return p


def _forward(
    held, q, k, positions, inv_freq, base, start, start_rows, factor, factor_rows, interleaved,
    inverse=False,
):  # fmt: skip
    p = params_of(
        held, q, k, positions, interleaved, factor, factor_rows, inv_freq.shape[-1],
        groups_of(inv_freq),
    )  # fmt: skip
    used = frequencies(held, inv_freq, base, start, start_rows)
    setattr(p, "undo" if inverse else "turn", used)
    return p


def rope(q, k, *arguments):
    """longrope::rope."""
    held = []
    p = _forward(held, q, k, *arguments)
    outputs = fresh(q), fresh(k)
    p.q_out, p.k_out = map(Heads.of, outputs)
    call("emulated_rope", p, outputs)
    return outputs


def rope_(q, k, *arguments):
    """longrope::rope_."""
    held = []
    p = _forward(held, q, k, *arguments)
    p.q_out, p.k_out = p.q, p.k
    call("emulated_rope", p, (q, k))


def rope_backward(grad_q, grad_k, q, k, *arguments):
    """longrope::rope_backward."""
    held = []
    forward = _forward(held, q, k, *arguments)
    params = RopeBackwardParams(forward, Heads.of(grad_q), Heads.of(grad_k))
    blocks = runtime().library.emulated_rope_backward_blocks
    blocks.restype = c_int64
    pairs = forward.pairs
    shape = (forward.groups, q.shape[0], blocks(ctypes.byref(params)), 2 * pairs + 1)
    partial = poisoned(shape, torch.float64)
    params.partial = partial.data_ptr()
    call("emulated_rope_backward", params, (partial,))
    sums = partial.sum(2).transpose(0, 1)
    rows = sums if arguments[1].dim() == 3 else sums[:, 0]
    base = sums[..., pairs:-1].sum(1)
    return tuple(
        t.clone(memory_format=torch.contiguous_format)
        for t in (rows[..., :pairs], base, rows[..., -1])
    )


def rerotate_out(
    k, positions, from_inv_freq, from_base, from_start, to_inv_freq, to_base, to_start, factor,
    factor_groups, interleaved, out,
):  # fmt: skip
    """longrope::rerotate_out."""
    held = []
    p = params_of(
        held, k, out, positions, interleaved, factor, factor_groups, from_inv_freq.shape[-1],
        max(groups_of(from_inv_freq), groups_of(to_inv_freq)),
    )  # fmt: skip
    p.undo = frequencies(held, from_inv_freq, from_base, from_start)
    p.turn = frequencies(held, to_inv_freq, to_base, to_start)
    p.q_out = p.k
    p.k.heads = p.k_out.heads = 0
    call("emulated_rope", p, (out,))


def rerotate(k, *arguments):
    """longrope::rerotate."""
    out = fresh(k)
    rerotate_out(k, *arguments, out)
    return out


def rerotate_(k, *arguments):
    """longrope::rerotate_."""
    rerotate_out(k, *arguments, k)


def tiered(held, p, inv_freq, base, start, start_tiers, factor_tiers):
    """Return frequencies in tiers, and set the factors of p."""

    def rows(t, dims):
        held.append(t.contiguous())
        return held[-1].data_ptr(), 0 if t.dim() == dims else held[-1].stride(0)

    f = RopeFrequencies(start_tokens=start, tiers=inv_freq.shape[-2])
    f.inv_freq, f.inv_freq_stride = rows(inv_freq, 2)
    if inv_freq.dim() == 4:
        p.groups = inv_freq.shape[1]
        f.inv_freq_stride, f.inv_freq_group_stride = group_strides(inv_freq)
    if base is not None:
        f.base_inv_freq, f.base_inv_freq_stride = rows(base, 1)
    if start_tiers is not None:
        f.start_tokens_rows, f.start_tokens_stride = rows(start_tiers, 1)
    if factor_tiers is not None:
        p.attention_factor_rows, p.attention_factor_stride = rows(factor_tiers, 1)
        if factor_tiers.dim() == 3:
            strides = group_strides(factor_tiers)
            p.attention_factor_stride, p.attention_factor_group_stride = strides
    return f


def rerotate_rows_(
    k, positions, from_tier, to_tier, inv_freq, base, start, start_tiers, factor, factor_tiers,
    interleaved,
):  # fmt: skip
    """longrope::rerotate_rows_."""
    held = [from_tier.contiguous(), to_tier.contiguous()]
    p = params_of(held, k, k, positions, interleaved, factor, None, inv_freq.shape[-1])
    p.turn = p.undo = tiered(held, p, inv_freq, base, start, start_tiers, factor_tiers)
    p.undo.tier_rows, p.turn.tier_rows = (t.data_ptr() for t in held[:2])
    p.q_out = p.k
    p.k.heads = p.k_out.heads = 0
    call("emulated_rope", p, (k,))


IMPLEMENTATIONS = {
    f.__name__: f
    for f in (rope, rope_, rope_backward, rerotate, rerotate_out, rerotate_, rerotate_rows_)
}
