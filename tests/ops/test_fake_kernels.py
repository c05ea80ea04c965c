"""Meta tensors are refused where real ones are, in the same words, and else give the same shapes.

Every op of the dispatcher is called as it should be, then with one argument spoilt, each in many
ways: both kinds of tensors must fare alike.
"""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from longrope.ops._arguments import argument_names

pytestmark = pytest.mark.usefixtures("one_thread")

OPS = torch.ops.longrope


def ones(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def whole(*shape):
    return ones(*shape, dtype=torch.int64)


def double(*shape):
    return ones(*shape, dtype=torch.float64)


HEADS = {"q": ones(2, 4, 5, 8), "k": ones(2, 2, 5, 8), "positions": torch.arange(5)}
TURN = {
    "inv_freq": double(3), "base_inv_freq": double(2, 3), "start_tokens": 0,
    "start_tokens_rows": whole(2), "attention_factor": 1.0, "attention_factor_rows": double(2),
    "interleaved": False,
}  # fmt: skip
SETS = {
    "k": ones(2, 2, 5, 8), "positions": torch.arange(5), "from_inv_freq": double(3),
    "from_base_inv_freq": double(3), "from_start_tokens": 2, "to_inv_freq": double(2, 3),
    "to_base_inv_freq": double(3), "to_start_tokens": 1, "attention_factor": 1.0,
    "attention_factor_groups": None, "interleaved": True,
}  # fmt: skip
TIERS = {
    "inv_freq": double(2, 3), "base_inv_freq": double(3), "start_tokens": 0,
    "start_tokens_tiers": whole(2), "attention_factor": 1.0, "attention_factor_tiers": double(2, 2),
    "interleaved": False,
}  # fmt: skip
ATTENTION = {
    "q": ones(2, 4, 5, 8), "k": ones(2, 2, 6, 8), "v": ones(2, 2, 6, 8), "causal": True,
    "query_start": 1, "query_start_rows": whole(2), "key_start": 0, "key_start_rows": None,
    "key_length": 0, "key_length_rows": whole(2), "query_begin": 0, "query_begin_rows": None,
    "query_end": 5, "query_end_rows": whole(2), "window": 3, "scale": 0.5, "softcap": 2.0,
}  # fmt: skip
LSE = ones(2, 4, 5)
NLL = {
    "hidden": ones(5, 8), "weight": ones(7, 8), "targets": whole(5), "ignore_index": -100,
    "softcap": 2.0,
}  # fmt: skip
CALLS = {
    "rope": HEADS | TURN | {"inverse": False},
    "rope_": HEADS | TURN,
    "rope_backward": {"grad_q": HEADS["q"], "grad_k": HEADS["k"]} | HEADS | TURN
    | {"inverse": True},
    "rerotate": SETS,
    "rerotate_out": SETS | {"out": ones(2, 2, 5, 8)},
    "rerotate_": SETS,
    "rerotate_rows_": {
        "k": ones(2, 2, 5, 8), "positions": torch.arange(5), "from_tier": whole(2),
        "to_tier": whole(2),
    } | TIERS,
    "attention": ATTENTION,
    "attention_rotated": ATTENTION | {
        "query_positions": torch.arange(5), "key_positions": torch.arange(6),
        "limits": torch.tensor([2, 9]),
    } | TIERS,
    "attention_backward": {"grad_out": ATTENTION["q"], "grad_lse": LSE} | ATTENTION
    | {"out": ATTENTION["q"], "lse": LSE},
    "merge_attention": {
        "out_a": ATTENTION["q"], "lse_a": LSE, "out_b": ATTENTION["q"], "lse_b": LSE,
    },
    "linear_nll": NLL,
    "linear_nll_backward": NLL | {
        "grad_nll": ones(5), "stats": ones(2, 5), "need_hidden": True, "need_weight": False,
    },
    "linear_nll_with_gradient": NLL | {"edge": ones(0, 8)},
    "linear_nll_scale": {
        "grad_nll": ones(5), "gradient": ones(5, 8), "targets": whole(5), "edge": ones(0, 8),
        "ignore_index": -100,
    },
    "candidate_sums": {
        "nll": ones(5), "targets": whole(5), "candidate": whole(5), "candidates": 3,
        "ignore_index": -100,
    },
}  # fmt: skip
# The same where frequencies come by group of heads.
GROUPED = {
    "rope": {"inv_freq": double(1, 2, 3), "attention_factor_rows": double(2, 2)},
    "rope_backward": {"inv_freq": double(2, 2, 3), "attention_factor_rows": double(1, 2)},
    "rerotate": {
        "from_inv_freq": double(2, 2, 3), "to_inv_freq": double(1, 2, 3),
        "attention_factor_groups": double(1, 2),
    },
    "rerotate_": {"to_inv_freq": double(2, 2, 3), "attention_factor_groups": double(2, 2)},
    "rerotate_rows_": {
        "inv_freq": double(1, 2, 2, 3), "attention_factor_tiers": double(2, 2, 2),
    },
}  # fmt: skip
# What no fake can know: the values in tensors.
VALUES = re.compile(r"values in \[|expected -1 \(not rotated\)|growing positions")


def spoilt(value):
    """Yield wrong, and a few other right, values in place of one."""
    if isinstance(value, Tensor):
        yield from (value.int(), value.double(), value.bfloat16())
        for dim, size in enumerate(value.shape):
            if size == 0:
                continue
            yield value.narrow(dim, 0, size - 1)
            yield value.narrow(dim, 0, 0)
            yield torch.cat([value, value], dim)
            yield value[(slice(None),) * dim + (0,)]
            yield value.narrow(dim, 0, 1).expand(value.shape)
        yield value[None]
        yield value.mT.contiguous().mT if value.dim() > 1 else torch.stack([value, value], 1)[:, 0]
    elif isinstance(value, bool) or value is None:
        return
    elif isinstance(value, int):
        yield from (-1, 0, 7)
    else:
        yield from (-1.0, 0.0, math.nan, math.inf)


def as_meta(value):
    if not isinstance(value, Tensor):
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def outcome(op, arguments):
    """Return what comes out, described, or the error."""
    try:
        out = op(*arguments)
    except ValueError as error:
        sentence = str(error).split("\n")[0]
        return re.sub(r" on (cpu|meta)", "", sentence.replace("[2, 2, 2]", "[...]"))
    out = out if isinstance(out, tuple) else (out,)
    return [
        None if t is None else (t.dtype, t.shape, t.stride() if t.numel() else None) for t in out
    ]


def names_argument(error):
    return error.split(":")[0]


def cases(name):
    order = argument_names(name)
    assert set(order) == set(CALLS[name]), "an argument of the schema is missing here"
    for changes in ({}, *([GROUPED[name]] if name in GROUPED else [])):
        plain = [(CALLS[name] | changes)[n] for n in order]
        yield None, plain
        for i, value in enumerate(plain):
            for other in spoilt(value):
                yield order[i], [*plain[:i], other, *plain[i + 1 :]]


def fresh(arguments):
    """Each its own memory, as ops that write in place want it, with strides as they are."""
    return [
        torch.empty_strided(a.shape, a.stride(), dtype=a.dtype).copy_(a)
        if isinstance(a, Tensor) and 0 not in a.stride()
        else a
        for a in arguments
    ]


def test_every_op_is_here():
    ops = [
        n.removeprefix("longrope::")
        for n in torch._C._dispatch_get_all_op_names()
        if n.startswith("longrope::")
    ]
    assert {n for n in ops if not n.startswith("attend_tiers")} == set(CALLS)


@pytest.mark.parametrize("name", CALLS)
def test_real_and_meta_tensors_fare_alike(name):
    op = getattr(OPS, name)
    refused = 0
    for spoilt_one, arguments in cases(name):
        real, meta = outcome(op, fresh(arguments)), outcome(op, list(map(as_meta, arguments)))
        told = f"{spoilt_one}: {real} {meta}"
        if isinstance(real, str):
            if VALUES.search(real):
                continue
            assert isinstance(meta, str), told
            assert names_argument(real) == names_argument(meta), told
            refused += 1
        else:
            assert real == meta, told
    assert refused >= 10
    for spoilt_one, arguments in cases(name):
        assert spoilt_one or not isinstance(outcome(op, fresh(arguments)), str)
