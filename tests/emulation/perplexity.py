"""torch.ops.longrope.linear_nll and its relatives over the emulated kernels.

The loops over chunks are those of csrc/bindings/perplexity_chunks.h, with chunks so small that
tests meet their borders; the matrix products are torch's.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int, c_int64, c_void_p

import torch

from emulation.library import DTYPES, call, poisoned

CHUNK = 136
ROWS = 48


class LogitsChunk(ctypes.Structure):
    """As csrc/perplexity/perplexity.h says."""

    _fields_ = [
        ("logits", c_void_p),
        *((name, c_int64) for name in ("row_stride", "rows", "first", "columns", "vocab")),
        ("targets", c_void_p),
        ("ignore_index", c_int64),
        ("softcap", c_double),
    ]


class NllChunkParams(ctypes.Structure):
    """As csrc/perplexity/perplexity.h says."""

    _fields_ = [
        ("chunk", LogitsChunk),
        *((name, c_void_p) for name in ("target_logit", "largest", "log_sum", "nll")),
    ]


class NllBackwardChunkParams(ctypes.Structure):
    """As csrc/perplexity/perplexity.h says."""

    _fields_ = [
        ("chunk", LogitsChunk),
        *((name, c_void_p) for name in ("largest", "log_sum", "grad_nll")),
        ("dtype", c_int),
        ("grad_logits", c_void_p),
        ("grad_row_stride", c_int64),
    ]


class CandidateSumsParams(ctypes.Structure):
    """As csrc/perplexity/perplexity.h says."""

    _fields_ = [
        *((name, c_void_p) for name in ("nll", "targets", "candidate")),
        *((name, c_int64) for name in ("rows", "candidates", "ignore_index")),
        *((name, c_void_p) for name in ("sums", "counts")),
    ]


def chunks(hidden, weight, targets, ignore_index, softcap):
    """Yield each chunk's rows, columns, description and logits."""
    for row in range(0, len(targets), ROWS):
        rows = slice(row, min(row + ROWS, len(targets)))
        for first in range(0, max(len(weight), 1), CHUNK):
            columns = slice(first, min(first + CHUNK, len(weight)))
            logits = poisoned((rows.stop - rows.start, CHUNK), torch.float32)
            logits[:, : columns.stop - first] = hidden[rows].float() @ weight[columns].float().T
            yield rows, columns, logits, LogitsChunk(
                logits.data_ptr(), CHUNK, rows.stop - rows.start, first, columns.stop - first,
                len(weight), targets[rows].data_ptr(), ignore_index, softcap or 0.0,
            )  # fmt: skip


def linear_nll(hidden, weight, targets, ignore_index=-100, softcap=None):
    """longrope::linear_nll."""
    targets = targets.contiguous()
    size = len(targets)
    nll = poisoned((size,), torch.float32)
    stats = poisoned((2, size), torch.float32)
    target_logit = poisoned((size,), torch.float32)
    for rows, _, _logits, chunk in chunks(hidden, weight, targets, ignore_index, softcap):
        written = target_logit[rows], stats[0, rows], stats[1, rows], nll[rows]
        params = NllChunkParams(chunk, *(t.data_ptr() for t in written))
        call("emulated_linear_nll_chunk", params, written)
    return nll, stats


def linear_nll_backward(
    grad_nll, hidden, weight, targets, stats, ignore_index, softcap, need_hidden, need_weight
):  # fmt: skip
    """longrope::linear_nll_backward."""
    targets, grad_nll = targets.contiguous(), grad_nll.contiguous()
    ignored = (targets == ignore_index)[:, None]
    scored = hidden.masked_fill(ignored, 0)  # 0 times what may be NaN
    grad_hidden, grad_weight = (
        torch.zeros(t.shape if need else 0) for t, need in ((hidden, need_hidden),
                                                            (weight, need_weight))
    )  # fmt: skip
    for rows, columns, _logits, chunk in chunks(hidden, weight, targets, ignore_index, softcap):
        grad_logits = poisoned((chunk.rows, CHUNK), hidden.dtype)
        params = NllBackwardChunkParams(
            chunk, stats[0, rows].data_ptr(), stats[1, rows].data_ptr(), grad_nll[rows].data_ptr(),
            DTYPES[hidden.dtype], grad_logits.data_ptr(), CHUNK,
        )  # fmt: skip
        call("emulated_linear_nll_backward_chunk", params, (grad_logits,))
        grad = grad_logits[:, : chunk.columns].float()
        if need_hidden:
            grad_hidden[rows] += grad @ weight[columns].float()
        if need_weight:
            grad_weight[columns] += grad.T @ scored[rows].float()
    if need_hidden:
        grad_hidden.masked_fill_(ignored, 0)
    return grad_hidden.to(hidden.dtype), grad_weight.to(weight.dtype)


def candidate_sums(nll, targets, candidate, candidates, ignore_index=-100):
    """longrope::candidate_sums."""
    held = [t.contiguous() for t in (nll, targets, candidate)]
    sums = poisoned((candidates,), torch.float64)
    counts = torch.full((candidates,), -1)
    params = CandidateSumsParams(
        *(t.data_ptr() for t in held), len(nll), candidates, ignore_index,
        sums.data_ptr(), counts.data_ptr(),
    )  # fmt: skip
    call("emulated_candidate_sums", params, (sums, counts))
    return sums, counts


IMPLEMENTATIONS = {f.__name__: f for f in (linear_nll, linear_nll_backward, candidate_sums)}
