"""Forward-mode derivatives: right, or one sentence, for every public op and each of its tensors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import forward_ad

import longrope
from longrope import ops

pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"original_length": 16, "target_length": 64, "rope_theta": 100.0, "rotary_dim": 6}
SETS = [getattr(longrope.RescaleFactors, rule)(**SIZES) for rule in ("yarn", "pi")]
POSITIONS = torch.arange(5)
TARGETS = torch.tensor([1, 0, -100, 3, 2])
TIER, OTHER = torch.tensor([0, 1]), torch.tensor([1, 1])


def merged(library, out_a, lse_a, out_b, lse_b):
    """Of sets of keys of which either one, or both, may be empty."""
    lse_a, lse_b = lse_a.clone(), lse_b.clone()
    lse_a[0, 0, :2] = lse_b[0, 0, 1:3] = -torch.inf
    out, lse = library.merge_attention(out_a, lse_a, out_b, lse_b)
    return out, lse.masked_fill(lse == -torch.inf, 0)


def turn(inv_freq):
    return ops.Rotation(inv_freq, POSITIONS, POSITIONS)


# How each op is called, with ops or ops.reference, on float tensors by shape: those that tangents
# pass through, and those whose tangents are refused.
HEADS, ONE_HEAD, LSE, PAIRS = (2, 2, 5, 8), (2, 1, 5, 8), (2, 2, 5), (3,)
FORMULAS = {
    "rope": (lambda o, q, k: o.rope(q, k, POSITIONS, torch.ones(3).double()), HEADS, ONE_HEAD),
    "rerotate": (lambda o, k: o.rerotate(k, POSITIONS, *SETS), HEADS),
    "merge_attention": (merged, HEADS, LSE, HEADS, LSE),
    "candidate_sums": (
        lambda o, nll: o.candidate_sums(nll, TARGETS, torch.tensor([0, 1, 0, 1, 2]), 3)[0], (5,),
    ),
}  # fmt: skip
REFUSED = {
    "rope": (lambda f, b, a: ops.rope(
        torch.ones(HEADS), torch.ones(ONE_HEAD), POSITIONS, f, 2, b, a), PAIRS, PAIRS, ()),
    "rope_": (lambda q, k, f, b, a: ops.rope_(q, k, POSITIONS, f, 2, b, a),
              HEADS, ONE_HEAD, PAIRS, PAIRS, ()),
    "rerotate": (lambda k, out: ops.rerotate(k, POSITIONS, *SETS, out=out), HEADS, HEADS),
    "rerotate_rows_": (lambda k, f, b, a: ops.rerotate_rows_(
        k, POSITIONS, TIER, OTHER, f, 2, b, a), HEADS, (2, 3), PAIRS, ()),
    "attention": (lambda q, k, v: ops.attention(q, k, v), HEADS, ONE_HEAD, ONE_HEAD),
    "attention with rotation": (
        lambda q, k, v, f: ops.attention(q, k, v, rotation=turn(f)), HEADS, HEADS, HEADS, PAIRS),
    "linear_nll": (lambda h, w: ops.linear_nll(h, w, TARGETS), (5, 8), (7, 8)),
}  # fmt: skip


def inputs(shapes):
    return tuple(torch.rand(shape, dtype=torch.float64) + 0.5 for shape in shapes)


def test_every_op_is_here():
    named = {name.split()[0] for name in (*FORMULAS, *REFUSED)}
    assert named == set(ops.__all__) - {"Rotation", "reference"}


@pytest.mark.parametrize("name", FORMULAS)
def test_tangents_are_those_of_the_reference(name):
    """By torch.func.jvp, in any of the arguments alone and in all of them."""
    function, *shapes = FORMULAS[name]
    values, moves = inputs(shapes), inputs(shapes)
    for moved in [*range(len(values)), None]:
        some = tuple(m if moved in (i, None) else torch.zeros_like(m) for i, m in enumerate(moves))
        got = torch.func.jvp(lambda *x: function(ops, *x), values, some)
        expected = torch.func.jvp(lambda *x: function(ops.reference, *x), values, some)
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", FORMULAS)
def test_dual_numbers_where_some_arguments_are_plain(name):
    function, *shapes = FORMULAS[name]
    values = inputs(shapes)
    for moved, value in enumerate(values):
        with forward_ad.dual_level():
            dual = list(values)
            dual[moved] = forward_ad.make_dual(value, torch.ones_like(value))
            got, expected = (function(library, *dual) for library in (ops, ops.reference))
            for one, other in zip(
                *(out if isinstance(out, tuple) else (out,) for out in (got, expected)), strict=True
            ):
                one, other = (forward_ad.unpack_dual(out).tangent for out in (one, other))
                if other is None:  # rope: the one that did not move
                    assert one is None or not one.any()
                else:
                    torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:.*performance drop")
@pytest.mark.parametrize("name", FORMULAS)
def test_jacobian(name):
    """By jacfwd, which maps over tangents."""
    function, *shapes = FORMULAS[name]
    values = inputs(shapes)

    def first(out):
        return out[0] if isinstance(out, tuple) else out

    got = torch.func.jacfwd(lambda x: first(function(ops, x, *values[1:])))(values[0])
    expected = torch.autograd.functional.jacobian(
        lambda x: first(function(ops, x, *values[1:])), values[0]
    )
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("name", REFUSED)
def test_a_tangent_without_a_formula_is_refused(name):
    """Each argument in turn, instead of a derivative of zero."""
    function, *shapes = REFUSED[name]
    values = inputs(shapes)
    for moved, value in enumerate(values):

        def call(x, moved=moved):
            return function(*(x if i == moved else v.clone() for i, v in enumerate(values)))

        message = rf"^{name.split()[0]}.*: expected no forward-mode tangents .*, got .*[^.]$"
        with pytest.raises(NotImplementedError, match=message):
            torch.func.jvp(call, (value,), (torch.ones_like(value),))
        function(*(v.clone() for v in values))  # without one it goes
