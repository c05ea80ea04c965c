"""ops.linear_nll and ops.candidate_sums under autograd, torch.compile, and with wrong inputs."""

from __future__ import annotations

import random

import pytest
import torch

from longrope import ops

IGNORED = -100
pytestmark = pytest.mark.usefixtures("one_thread")


def problem(dtype=torch.float64, rows=7, embed=5, vocab=11):
    hidden = torch.randn(rows, embed).to(dtype).requires_grad_()
    weight = torch.randn(vocab, embed).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    targets[2] = IGNORED
    return hidden, weight, targets


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck(softcap):
    """Derivatives against differences in float64."""
    hidden, weight, targets = problem()
    candidate = torch.tensor([0, 1, 1, 0, 2, 2, 2])
    assert torch.autograd.gradcheck(
        lambda h, w: ops.linear_nll(h, w, targets, softcap=softcap), (hidden, weight)
    )
    assert torch.autograd.gradcheck(
        lambda h, w: ops.candidate_sums(
            ops.linear_nll(h, w, targets, softcap=softcap), targets, candidate, 4
        )[0],
        (hidden, weight),
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradcheck_with_a_frozen_head(isa, softcap):
    hidden, weight, targets = problem()
    weight.requires_grad_(False)
    assert torch.autograd.gradcheck(
        lambda h: ops.linear_nll(h, weight, targets, softcap=softcap), (hidden,)
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_no_second_derivative(frozen):
    """Asked for, it is refused instead of wrong."""
    hidden, weight, targets = problem()
    weight.requires_grad_(not frozen)
    (grad,) = torch.autograd.grad(
        ops.linear_nll(hidden, weight, targets).sum(), hidden, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="second derivative"):
        grad.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(dtype):
    """Schemas, fake kernels and autograd registrations are what torch.compile expects."""
    hidden, weight, targets = problem(dtype)
    nll = torch.ops.longrope.linear_nll
    torch.library.opcheck(nll, (hidden, weight, targets, IGNORED, 3.0))
    frozen = (hidden, weight.detach(), targets, hidden.detach()[:0], IGNORED, 3.0)
    torch.library.opcheck(torch.ops.longrope.linear_nll_with_gradient, frozen)
    torch.library.opcheck(
        torch.ops.longrope.linear_nll_scale,
        (torch.ones(7), hidden.detach(), targets, hidden.detach()[:0], IGNORED),
    )
    values, stats = (t.detach() for t in nll(hidden, weight, targets))
    plain = (hidden.detach(), weight.detach(), targets, stats, IGNORED, None)
    for wanted in ((True, True), (True, False)):
        torch.library.opcheck(
            torch.ops.longrope.linear_nll_backward, (torch.ones(7), *plain, *wanted)
        )
    candidate = torch.zeros(7, dtype=torch.int64)
    torch.library.opcheck(
        torch.ops.longrope.candidate_sums, (values.requires_grad_(), targets, candidate, 3, IGNORED)
    )


@pytest.mark.parametrize("frozen", [False, True])
def test_compile(frozen):
    """One graph without breaks, forward and backward, also where the number of rows changes."""

    def loss(hidden, weight, targets, candidate):
        nll = ops.linear_nll(hidden, weight, targets, softcap=5.0)
        sums, counts = ops.candidate_sums(nll, targets, candidate, 2)
        return (sums / counts.clamp(min=1)).sum() + ops.linear_nll(hidden, weight, targets).sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for rows in (7, 9, 12):
        hidden, weight, targets = problem(torch.float32, rows)
        leaves = (hidden,) if frozen else (hidden, weight)
        weight.requires_grad_(not frozen)
        candidate = torch.arange(rows) % 2
        got = torch.autograd.grad(compiled(hidden, weight, targets, candidate), leaves)
        expected = torch.autograd.grad(loss(hidden, weight, targets, candidate), leaves)
        torch.testing.assert_close(got, expected)


DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@pytest.mark.parametrize("autocast", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("of_weight", DTYPES)
@pytest.mark.parametrize("of_hidden", DTYPES)
def test_autocast_takes_what_linear_takes(of_hidden, of_weight, autocast):
    """And gives what its dtype gives, with gradients in the dtypes that came."""
    hidden, _, targets = problem(of_hidden)
    _, weight, _ = problem(of_weight)
    with torch.autocast("cpu", autocast):
        try:
            product = torch.nn.functional.linear(hidden, weight).dtype
        except RuntimeError:
            with pytest.raises(ValueError, match="weight: expected"):
                ops.linear_nll(hidden, weight, targets)
            return
        nll = ops.linear_nll(hidden, weight, targets)
    narrow = [t.detach().to(product).requires_grad_() for t in (hidden, weight)]
    expected = ops.linear_nll(*narrow, targets)
    assert torch.equal(nll, expected)
    got = torch.autograd.grad(nll.sum(), (hidden, weight))
    for one, other, leaf in zip(
        got, torch.autograd.grad(expected.sum(), narrow), (hidden, weight), strict=True
    ):
        assert torch.equal(one, other.to(leaf.dtype)) and one.dtype == leaf.dtype


def test_autocast_in_a_compiled_graph():
    hidden, weight, targets = problem(torch.float32)

    def loss(hidden, weight, targets):
        with torch.autocast("cpu", torch.bfloat16):
            return ops.linear_nll(hidden, weight, targets)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(hidden, weight, targets), loss(hidden, weight, targets))


def wrong_inputs():
    hidden, weight, targets = torch.ones(3, 4), torch.ones(5, 4), torch.tensor([0, 1, 2])
    yield (hidden[0], weight, targets), r"hidden: expected \[T, E\] on cpu, got float32 \[4\]"
    yield (hidden.int(), weight, targets), r"hidden: expected float32.*got int32 \[3, 4\]"
    yield (hidden, weight[:, :3], targets), r"weight: expected.*got float32 \[5, 3\]"
    yield (hidden, weight.bfloat16(), targets), r"weight: expected.*got .*BFloat16|bfloat16"
    yield (hidden, weight.to("meta"), targets), r"weight: expected.*on cpu, got float32"
    yield (hidden, weight, targets.int()), r"targets: expected int64 \[3\] on cpu, got int32"
    yield (hidden, weight, targets[:2]), r"targets: expected int64 \[3\] on cpu, got int64 \[2\]"
    yield (
        (hidden, weight, torch.tensor([0, 5, 1])),
        r"targets: expected values in \[0, 5\) or ignore_index -100, got 5 at row 1",
    )
    yield (hidden, weight, torch.tensor([0, 1, -1])), r"targets: expected .*got -1 at row 2"
    yield (hidden, weight, targets, -100, 0.0), r"softcap: expected None or a positive number"
    yield (hidden, weight, targets, -100, float("nan")), r"softcap: expected"


@pytest.mark.parametrize(("arguments", "message"), list(wrong_inputs()))
def test_wrong_inputs(arguments, message):
    """Each gets one sentence that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        ops.linear_nll(*arguments)
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()


def test_wrong_candidates():
    """The same for the sums by candidate."""
    hidden, weight, targets = (t.detach() for t in problem(torch.float32))
    nll = ops.linear_nll(hidden, weight, targets)
    zeros = torch.zeros(7, dtype=torch.int64)
    for candidate, candidates, message in (
        (zeros[:3], 1, r"candidate: expected int64 \[7\] on cpu, got int64 \[3\]"),
        (zeros.float(), 1, r"candidate: expected int64 \[7\] on cpu, got float32 \[7\]"),
        (zeros + 2, 2, r"candidate: expected values in \[0, 2\), got 2 at row 0"),
        (zeros - 1, 2, r"candidate: expected values in \[0, 2\), got -1 at row 0"),
        (zeros, -1, r"candidates: expected a count, got -1"),
    ):
        with pytest.raises(ValueError, match=message):
            ops.candidate_sums(nll, targets, candidate, candidates)


def test_fuzz():
    """Random shapes, dtypes, layouts and devices are computed or refused, and never crash."""
    choose = random.Random(0).choice
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool]
    dtypes += [torch.complex64, torch.uint8]

    def tensor(dtypes=dtypes, shape=None):
        """Of any shape, or mostly of one."""
        if shape is None or choose([False] * 9 + [True]):
            shape = [choose([0, 1, 2, 3, 64]) for _ in range(choose([0, 1, 2, 2, 2, 2, 3]))]
        t = torch.randint(0, 3, shape).to(choose(dtypes))
        if choose([False, False, True]) and t.dim():
            t = t.transpose(0, -1)
        if choose([False, False, True]) and t.dim():
            t = t[::2]
        kind = choose(["dense"] * 8 + ["meta", "sparse"])
        return t.to("meta") if kind == "meta" else t.to_sparse() if kind == "sparse" else t

    op = torch.ops.longrope
    refused = 0
    for _ in range(400):
        same = choose(dtypes)
        rows, embed = choose([1, 2, 64]), choose([1, 3])
        h, w = tensor([same], (rows, embed)), tensor([same], (3, embed))
        t = tensor([torch.int64], (rows,))
        some = (h, w, tensor() if choose([False] * 3 + [True]) else t)
        scalars = choose([-100, 0, 2]), choose([None, 1.0, -1.0])
        for call, arguments in (
            (op.linear_nll, (*some, *scalars)),
            (
                op.linear_nll_backward,
                (
                    tensor(shape=(rows,)), *some, tensor(shape=(2, rows)), *scalars,
                    choose([True, False]), choose([True, False]),
                ),
            ),
            (
                op.candidate_sums,
                (
                    tensor(shape=(rows,)), t, tensor([torch.int64], (rows,)), choose([-1, 0, 3]), 0,
                ),
            ),
        ):  # fmt: skip
            try:
                call(*arguments)
            except (ValueError, RuntimeError, NotImplementedError, IndexError):
                refused += 1
    assert 400 < refused < 1200
