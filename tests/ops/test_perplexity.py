"""ops.linear_nll and ops.candidate_sums: values and gradients against their specification."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.criterion import assert_as_accurate
from torch.nn import functional as F

from longrope import ops
from longrope._native import _C

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
IGNORED = -100


# Small problems, on which threads would only wait for each other; they have a test of their own.
pytestmark = pytest.mark.usefixtures("one_thread")


def problem(rows, embed, vocab, dtype=torch.float32, scale=1.0):
    """Hidden states, a head and targets, every fifth row ignored, that ask for gradients."""
    hidden = (torch.randn(rows, embed) * scale).to(dtype).requires_grad_()
    weight = torch.randn(vocab, embed).to(dtype).requires_grad_()
    targets = torch.randint(0, vocab, (rows,))
    targets[4::5] = IGNORED
    return hidden, weight, targets


def naive(hidden, weight, targets, softcap=None):
    """The usual way, in the dtype of the inputs."""
    logits = (hidden @ weight.T).to(torch.promote_types(hidden.dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORED)


def value_and_gradients(function, hidden, weight, targets, grad, device="cpu", **keywords):
    """Compute on a device; the results come back to the CPU."""
    nll = function(hidden.to(device), weight.to(device), targets.to(device), **keywords)
    grads = torch.autograd.grad(nll, (hidden, weight), grad.to(nll))
    return nll.detach().cpu(), *(g.cpu() for g in grads)


def with_frozen_head(hidden, weight, targets, grad, device="cpu", **keywords):
    """The value, and the gradient of the hidden states alone."""
    there = (t.to(device) for t in (hidden, weight.detach(), targets))
    nll = ops.linear_nll(*there, **keywords)
    (gradient,) = torch.autograd.grad(nll, hidden, grad.to(nll))
    return nll.detach().cpu(), gradient.cpu()


def assert_accurate(hidden, weight, targets, softcap=None, device="cpu"):
    """Compare value and gradients, of a trained and of a frozen head, by the suite's criterion."""
    grad = torch.randn(len(targets))
    exact = value_and_gradients(
        naive, *(t.detach().double().requires_grad_() for t in (hidden, weight)), targets, grad,
        softcap=softcap,
    )  # fmt: skip
    low = value_and_gradients(naive, hidden, weight, targets, grad, softcap=softcap)
    got = value_and_gradients(
        ops.linear_nll, hidden, weight, targets, grad, device, softcap=softcap
    )
    assert got[0].dtype == torch.float32 and got[1].dtype == got[2].dtype == hidden.dtype
    # An nll is a difference of numbers as large as the logits, and a probability the exponential of
    # one: their rounding is the floor, below which one row is a matter of luck.
    logits = hidden.detach().double() @ weight.detach().double().T
    rounding = 4 * torch.finfo(torch.float32).eps * logits.abs().max().clamp(min=1)
    assert_as_accurate(got[0], low[0], exact[0], floor=rounding, name="nll")
    frozen = with_frozen_head(hidden, weight, targets, grad, device, softcap=softcap)
    assert_as_accurate(frozen[0], low[0], exact[0], floor=rounding, name="nll, frozen head")
    for i, one, name in ((1, got, "grad_hidden"), (2, got, "grad_weight"), (1, frozen, "frozen")):
        result = 2 * torch.finfo(hidden.dtype).eps * exact[i].flatten().abs()
        floor = result + rounding * exact[i].abs().max()
        assert_as_accurate(one[i], low[i], exact[i], floor=floor, name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "embed", "vocab"),
    [(1, 3, 1), (1, 64, 257), (7, 3, 257), (65, 96, 1000), (33, 50, 1056), (2100, 32, 65)],
)
def test_accuracy(backend, rows, embed, vocab, dtype):
    """Odd sizes, more than one block of tokens and of the vocabulary, on every backend."""
    assert_accurate(*problem(rows, embed, vocab, dtype), device=backend.device)


@pytest.mark.parametrize("dtype", DTYPES)
def test_softcap(backend, dtype):
    """Logits far below, around and far above the cap."""
    for scale in (0.01, 1.0, 30.0):
        made = problem(40, 32, 300, dtype, scale)
        assert_accurate(*made, softcap=3.0, device=backend.device)


def test_reference_is_cross_entropy():
    """The specification equals torch's own cross-entropy."""
    hidden, weight, targets = problem(9, 8, 21, torch.float64)
    grad = torch.randn(9)
    for softcap in (None, 2.0):
        expected = value_and_gradients(naive, hidden, weight, targets, grad, softcap=softcap)
        got = value_and_gradients(
            ops.reference.linear_nll, hidden, weight, targets, grad, softcap=softcap
        )
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_threads(threads):
    """The vocabulary and the tokens are cut among threads; so many that some have nothing to do."""
    torch.set_num_threads(threads)
    for rows, vocab in ((5, 1), (5, 3000), (700, 40)):
        assert_accurate(*problem(rows, 32, vocab))
        assert_accurate(*problem(rows, 32, vocab, torch.bfloat16))
    made = *problem(300, 32, 1500, torch.bfloat16), torch.randn(300)
    many = with_frozen_head(*made)
    torch.set_num_threads(1)
    assert all(map(torch.equal, many, with_frozen_head(*made)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_strided_and_poisoned(backend, dtype):
    """Rows with padding, transposed, expanded: what lies between the elements is never read."""
    nan, device = float("nan"), backend.device

    def padded(t, across):
        room = torch.full((2 * t.shape[0], 3 * t.shape[1]), nan, dtype=dtype, device=device)
        view = room[::2, ::3] if across else room[::2, : t.shape[1]]
        return view.copy_(t.detach())

    hidden, weight, targets = problem(20, 64, 70, dtype)
    grad = torch.randn(20)
    expected = value_and_gradients(ops.linear_nll, hidden, weight, targets, grad, device)
    hidden, weight, targets = (t.detach().to(device) for t in (hidden, weight, targets))
    views = [
        (padded(hidden, False), padded(weight, False)),
        (padded(hidden, True), padded(weight, True)),
        (hidden.T.contiguous().T, weight.T.contiguous().T),
    ]
    spread_targets = torch.full((20, 3), 10**9, device=device)[:, 1].copy_(targets)
    for h, w in views:
        h, w = h.requires_grad_(), w.requires_grad_()
        got = value_and_gradients(ops.linear_nll, h, w, spread_targets, grad, device)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b)
    row = weight[:1].expand(70, 64)  # stride 0
    nll = ops.linear_nll(hidden, row, targets)
    torch.testing.assert_close(nll[targets != IGNORED].cpu(), torch.full((16,), math.log(70)))


def test_huge_logits(backend):
    """Logits up to 2^100 neither overflow nor lose the difference of the two largest."""
    device = backend.device
    weight = torch.tensor([[1.0], [1.0 - 2**-20], [-1.0]], device=device)
    hidden = torch.tensor([[2.0**20], [-(2.0**20)], [2.0**100]], device=device)
    for target, expected in (
        (0, [math.log(1 + math.exp(-1)), 2.0**21, 0.0]),
        (1, [math.log(1 + math.exp(-1)) + 1, 2.0**21 - 1, 2.0**80]),
    ):
        nll = ops.linear_nll(hidden, weight, torch.full((3,), target, device=device))
        torch.testing.assert_close(nll.cpu(), torch.tensor(expected))
    hidden.requires_grad_()
    ops.linear_nll(
        hidden, weight, torch.zeros(3, dtype=torch.int64, device=device)
    ).sum().backward()
    p = 1 / (1 + math.e)
    torch.testing.assert_close(hidden.grad[:, 0].cpu(), torch.tensor([-p * 2**-20, -2.0, 0.0]))


@pytest.mark.parametrize("vocab", [3, 600])
def test_infinities_and_nan(backend, vocab):
    """-inf logits have probability 0; NaN, +inf and all -inf give NaN in their row alone."""
    inf, nan = float("inf"), float("nan")
    hidden = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, nan], [0.0, -1.0]])
    weight = torch.stack([torch.linspace(-1, 1, vocab), torch.ones(vocab)], dim=1)
    for row, value in ((0, -inf), (vocab - 1, -inf), (1, inf), (slice(None), -inf)):
        changed = weight.clone()
        changed[row, 0] = value
        h = hidden.clone()[:, :1].requires_grad_()  # E = 1: 0 * inf is NaN as well
        w = changed[:, :1].clone().requires_grad_()
        targets = torch.tensor([2, 0, 1, 1])
        expected = value_and_gradients(naive, h, w, targets, torch.ones(4))
        got = value_and_gradients(ops.linear_nll, h, w, targets, torch.ones(4), backend.device)
        got += with_frozen_head(h, w, targets, torch.ones(4), backend.device)[1:]
        for a, b in zip(got, (*expected, expected[1]), strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)
    there = (t.to(backend.device) for t in (hidden, weight, torch.tensor([2, 0, 1, 1])))
    nll = ops.linear_nll(*there)
    assert nll.isnan().tolist() == [False, False, True, False]


def test_ignored_rows(backend):
    """They give 0 and no gradient even where their hidden state is NaN, and 0 may be the index."""
    hidden, weight, targets = problem(12, 8, 30)
    kept = targets != IGNORED
    poisoned = hidden.detach().clone()
    poisoned[~kept] = float("nan")
    poisoned.requires_grad_()
    ones, device = torch.ones(12), backend.device
    got = value_and_gradients(ops.linear_nll, poisoned, weight, targets, ones, device)
    expected = value_and_gradients(
        ops.reference.linear_nll, hidden, weight, targets, torch.ones(12)
    )
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
    zero = targets.clone()
    zero[~kept] = 0
    there = (t.to(device) for t in (hidden, weight, zero))
    nll = ops.linear_nll(*there, ignore_index=0)
    assert torch.equal(nll.cpu() == 0, zero == 0)
    none = torch.full((12,), IGNORED)
    got = value_and_gradients(ops.linear_nll, hidden, weight, none, ones, device)
    assert all((t == 0).all() for t in got)


def test_empty():
    """No rows, no vocabulary, no embedding."""
    assert ops.linear_nll(torch.ones(0, 4), torch.ones(5, 4), torch.ones(0).long()).shape == (0,)
    none = torch.full((3,), IGNORED)
    assert ops.linear_nll(torch.ones(3, 4), torch.ones(0, 4), none).tolist() == [0, 0, 0]
    hidden, weight, targets = torch.ones(3, 0), torch.ones(5, 0), torch.tensor([0, 4, 2])
    hidden.requires_grad_()
    nll = ops.linear_nll(hidden, weight.requires_grad_(), targets)
    torch.testing.assert_close(nll, torch.full((3,), math.log(5)))
    nll.sum().backward()
    assert hidden.grad.shape == (3, 0) and weight.grad.shape == (5, 0)
    empty = torch.ones(0, 4, requires_grad=True)
    ops.linear_nll(empty, torch.ones(5, 4), torch.ones(0).long()).sum().backward()
    assert empty.grad.shape == (0, 4)


def test_only_the_wanted_gradient():
    """A frozen head costs no gradient of its own, and the other's does not change."""
    hidden, weight, targets = problem(70, 32, 40)
    both = value_and_gradients(ops.linear_nll, hidden, weight, targets, torch.ones(70))
    _, h = with_frozen_head(hidden, weight, targets, torch.ones(70))
    (w,) = torch.autograd.grad(ops.linear_nll(hidden.detach(), weight, targets).sum(), weight)
    assert torch.equal(w, both[2])
    torch.testing.assert_close(h, both[1])  # another order of the sums


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_frozen_head_and_tokens_that_are_all_but_certain(backend, dtype):
    """p - 1 keeps its digits, where p alone would have none left in 16 bits."""
    weight = torch.eye(64).to(dtype)
    targets = torch.arange(64) % 50
    for logit in (2, 8, 12):
        hidden = (logit * weight[targets]).requires_grad_()
        _, got = with_frozen_head(hidden, weight, targets, torch.ones(64), backend.device)
        p = math.exp(logit) / (math.exp(logit) + 63)
        rest = (1 - p) / 63
        expected = torch.full((64, 64), rest).index_put(
            (torch.arange(64), targets), torch.tensor(p - 1)
        )
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(got.float(), expected, rtol=2 * eps + 1e-5, atol=2**-24)


def test_a_frozen_head_with_an_infinite_score_of_the_target(backend):
    """NaN, as without a gradient and in torch: a loss of 0 would pass for a perfect one."""
    hidden = torch.tensor([[1e30, 0.0]], requires_grad=True)
    weight = torch.tensor([[1e30, 0.0], [0.0, 1.0], [0.0, 2.0]])
    targets = torch.tensor([0])
    nll, _ = with_frozen_head(hidden, weight, targets, torch.ones(1), backend.device)
    there = (t.to(backend.device) for t in (hidden.detach(), weight, targets))
    assert nll.isnan().all() and ops.linear_nll(*there).isnan()


def test_a_frozen_head_whose_maxima_grow_and_begin_at_minus_infinity(backend):
    """What is summed already is scaled: by 0, by little, and not where the largest stays."""
    vocab = 3300  # four blocks
    hidden = torch.ones(3, 1, requires_grad=True)
    for first, growth in ((-200.0, 60.0), (-float("inf"), -90.0), (50.0, -1.0)):
        weight = (
            torch.linspace(0, 1, vocab)[:, None] + growth * (torch.arange(vocab) // 1024)[:, None]
        )
        weight[:1024] += first
        for target in (1030, vocab - 1):
            targets = torch.full((3,), target)
            exact = hidden.detach().double().requires_grad_()
            nll = naive(exact, weight.double(), targets)
            expected = nll.detach(), *torch.autograd.grad(nll.sum(), exact)
            got = with_frozen_head(hidden, weight, targets, torch.ones(3), backend.device)
            torch.testing.assert_close(got[0].double(), expected[0], rtol=1e-5, atol=1e-5)
            if math.isfinite(first):
                torch.testing.assert_close(got[1].double(), expected[1], rtol=1e-4, atol=1e-4)
            else:
                assert got[1].isnan().all()  # 0 * inf, as in a plain product


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
def test_a_frozen_head_under_any_upstream_gradient(backend, dtype):
    """Each row is scaled by its own; ignored rows give 0 whatever comes."""
    if dtype not in backend.dtypes:
        pytest.skip(f"no {dtype} on {backend.name}")
    device = backend.device
    hidden, weight, targets = problem(300, 37, 50, dtype)
    kept = targets != IGNORED
    _, ones = with_frozen_head(hidden, weight, targets, torch.ones(300), device)
    grad = torch.randn(300, dtype=torch.float64)
    grad[~kept] = float("nan")
    _, got = with_frozen_head(hidden, weight, targets, grad, device)
    assert (got[~kept] == 0).all()
    wide = torch.promote_types(dtype, torch.float32)
    expected = (ones.to(wide) * grad.to(wide)[:, None]).to(dtype)
    assert torch.equal(got[kept], expected[kept])
    columns = torch.randn(300, 2, device=device, dtype=wide)[:, 0].expand_as(grad)
    assert columns.stride() == (2,)
    _, got = with_frozen_head(hidden, weight, targets, columns, device)
    assert torch.equal(got, (ones.to(wide) * columns.cpu()[:, None]).to(dtype))


def test_population(backend):
    """Sums and counts by candidate, with one that has no rows, and their gradients."""
    hidden, weight, targets = problem(50, 16, 30)
    candidate = torch.randint(0, 4, (50,))
    candidate[candidate == 2] = 0
    device = backend.device
    nll = ops.linear_nll(hidden.to(device), weight.to(device), targets.to(device))
    expected_nll = ops.reference.linear_nll(hidden, weight, targets)
    there = ops.candidate_sums(nll, targets.to(device), candidate.to(device), 4)
    sums, counts = (t.cpu() for t in there)
    expected, expected_counts = ops.reference.candidate_sums(expected_nll, targets, candidate, 4)
    assert sums.dtype == torch.float64 and counts.dtype == torch.int64
    torch.testing.assert_close(sums, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(counts, expected_counts)
    assert counts.sum() == 40 and counts[2] == 0 and sums[2] == 0
    grad = torch.randn(4, dtype=torch.float64)
    got = torch.autograd.grad(sums, (hidden, weight), grad)
    for a, b in zip(got, torch.autograd.grad(expected, (hidden, weight), grad), strict=True):
        torch.testing.assert_close(a, b)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(1, 130), embed=st.integers(1, 40), vocab=st.integers(1, 300),
    isa=st.sampled_from(_C.isas()), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_properties(rows, embed, vocab, isa, seed):
    """nll is cross-entropy; a constant added to all logits changes nothing; sums are segments'."""
    torch.manual_seed(seed)
    hidden, weight, targets = (t.detach() for t in problem(rows, embed, vocab, torch.float64))
    before = _C.isa()
    _C.set_isa(isa)
    try:
        nll = ops.linear_nll(hidden, weight, targets)
        torch.testing.assert_close(nll, naive(hidden, weight, targets))
        shifted = ops.linear_nll(
            torch.cat([hidden, torch.full((rows, 1), 7.0, dtype=torch.float64)], 1),
            torch.cat([weight, torch.ones(vocab, 1, dtype=torch.float64)], 1), targets,
        )  # fmt: skip
        torch.testing.assert_close(shifted, nll)
        cut = rows // 3
        candidate = (torch.arange(rows) >= cut).long()
        sums, _ = ops.candidate_sums(nll, targets, candidate, 2)
        torch.testing.assert_close(sums, torch.stack([nll[:cut].sum(), nll[cut:].sum()]))
        low = ops.linear_nll(hidden.float(), weight.float(), targets)
        torch.testing.assert_close(low, nll.float(), rtol=1e-5, atol=1e-4)
    finally:
        _C.set_isa(before)


PEAK = """
import resource, torch
from longrope import ops
torch.set_num_threads(1)
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(rows, vocab):
    hidden, weight = torch.randn(rows, 32, requires_grad=True), torch.randn(vocab, 32)
    targets = torch.randint(0, vocab, (rows,))
    ops.linear_nll(hidden, weight.requires_grad_(TRAINED), targets).sum().backward()
step(64, 64)
before = peak()
step(4096, 32768)
print(peak() - before)
"""


@pytest.mark.parametrize("trained", [True, False])
def test_memory(trained):
    """Forward and backward stay far below the 512 MiB that float32 logits would take alone."""
    script = PEAK.replace("TRAINED", str(trained))
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert float(answer.stdout) < 64  # MiB: naive keeps the logits and their softmax, 1024
