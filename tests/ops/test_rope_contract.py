"""ops.rope and its relatives under autograd, torch.compile, and with wrong inputs."""

from __future__ import annotations

import math
import random

import pytest
import torch

from longrope import ops

pytestmark = pytest.mark.usefixtures("one_thread")


def problem(dtype=torch.float64, batch=2, tokens=5):
    """q, k, positions, inv_freq, start_tokens, base_inv_freq, attention_factor."""
    q, k = torch.randn(batch, 3, tokens, 10).to(dtype), torch.randn(batch, 1, tokens, 10).to(dtype)
    inv_freq, base = torch.rand(batch, 4).double(), torch.rand(4).double()
    start = torch.arange(batch)
    return q, k, torch.arange(tokens), inv_freq, start, base, torch.rand(batch).double() + 0.5


@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved):
    """Derivatives against differences in float64, and again for q and k."""
    q, k, positions, inv_freq, start, base, factor = problem()
    leaves = [t.requires_grad_() for t in (q, k, inv_freq, base, factor)]

    def call(q, k, inv_freq, base, factor):
        return ops.rope(q, k, positions, inv_freq, start, base, factor, interleaved)

    assert torch.autograd.gradcheck(call, leaves)
    rest = [t.detach() for t in leaves[2:]]
    assert torch.autograd.gradgradcheck(lambda q, k: call(q, k, *rest), leaves[:2])


def test_shared_frequencies_and_scalar_factor_get_their_summed_gradient():
    q, k, positions, *_ = problem()
    inv_freq, factor = torch.rand(4).double().requires_grad_(), torch.tensor(1.3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda f, a: ops.rope(q, k, positions, f, attention_factor=a.double()),
        (inv_freq, factor.double().detach().requires_grad_()),
    )
    ops.rope(q, k, positions, inv_freq, attention_factor=factor)[0].sum().backward()
    assert factor.grad.shape == () and inv_freq.grad.shape == (4,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_opcheck(dtype):
    """Schemas, fake kernels and autograd registrations are what torch.compile expects."""
    q, k, positions, inv_freq, start, base, factor = problem(dtype)
    turned_by = (positions, inv_freq, base, 0, start, 1.0, factor, False)
    q.requires_grad_(), inv_freq.requires_grad_()
    torch.library.opcheck(torch.ops.longrope.rope, (q, k, *turned_by, False))
    q, inv_freq = q.detach(), inv_freq.detach()
    turned_by = (positions, inv_freq, base, 0, start, 1.0, factor, False)
    torch.library.opcheck(torch.ops.longrope.rope_, (q, k, *turned_by))
    torch.library.opcheck(torch.ops.longrope.rope_backward, (q, k, q, k, *turned_by, False))
    sets = (inv_freq[0], None, 0, inv_freq[1], base, 2, 1.1, None, False)
    torch.library.opcheck(torch.ops.longrope.rerotate, (k.requires_grad_(), positions, *sets))
    k = k.detach()
    torch.library.opcheck(torch.ops.longrope.rerotate_, (k, positions, *sets))
    torch.library.opcheck(torch.ops.longrope.rerotate_out, (k, positions, *sets, k.clone()))


def test_compile():
    """One graph without breaks, forward and backward, also where lengths change."""

    def loss(q, k, positions, inv_freq, start, base, factor):
        q, k = ops.rope(q, k, positions, inv_freq, start, base, factor)
        return (q.sum(1) * k.sum(1)).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for tokens in (5, 7, 12):
        q, k, positions, inv_freq, start, base, factor = problem(torch.float32, tokens=tokens)
        leaves = [t.requires_grad_() for t in (q, k, inv_freq, factor)]
        arguments = (q, k, positions, inv_freq, start, base, factor)
        got = torch.autograd.grad(compiled(*arguments), leaves)
        torch.testing.assert_close(got, torch.autograd.grad(loss(*arguments), leaves))


def test_compile_in_place():
    def turn(q, k, positions, inv_freq):
        ops.rope_(q, k, positions, inv_freq)
        return q + 1

    q, k, positions, inv_freq, *_ = problem(torch.float32)
    expected = ops.rope(q, k, positions, inv_freq)
    got = torch.compile(turn, fullgraph=True, backend="aot_eager")(q, k, positions, inv_freq)
    torch.testing.assert_close((got - 1, k), expected)


def test_a_batch_of_rows_agrees_with_single_rows():
    q, k, positions, inv_freq, start, base, factor = problem(torch.float32, batch=3)
    whole = ops.rope(q, k, positions, inv_freq, start, base, factor)
    for b in range(3):
        one = ops.rope(
            q[b : b + 1], k[b : b + 1], positions, inv_freq[b], int(start[b]), base,
            factor[b].item(),
        )  # fmt: skip
        for got, rows in zip(one, whole, strict=True):
            assert torch.equal(got[0], rows[b])


def wrong_inputs():
    q, k, positions, inv_freq, start, base, factor = problem(torch.float32)
    yield (q[0], k, positions, inv_freq), r"q: expected \[B, heads, N, D\], got float32 \[3, 5, 10"
    yield (q.int(), k.int(), positions, inv_freq), r"q: expected float32.*got int32"
    yield (q, k.double(), positions, inv_freq), r"k: expected the dtype.*got float64"
    yield (q, k[:, :, :4], positions, inv_freq), r"k: expected the dtype, B, N and D"
    yield (q, k.to("meta"), positions, inv_freq), r"k: expected device cpu, got meta"
    yield (q, k, positions.to("meta"), inv_freq), r"positions: expected device cpu, got meta"
    yield (q, k, list(range(5)), inv_freq), r"positions: expected a tensor, got .*list"
    yield (q, k, positions, inv_freq.numpy()), r"inv_freq: expected a tensor, got .*ndarray"
    yield (None, k, positions, inv_freq), r"q: expected a tensor, got .*None"
    yield (q, k, positions, inv_freq, 4.0, base), r"start_tokens: expected an int or int64 \[B\]"
    yield (q, k, positions, inv_freq, 0, None, "a"), r"attention_factor: expected a number, got 'a'"
    yield (q, k, positions, inv_freq, 0, None, 1.0, 1), r"interleaved: expected a bool, got 1"
    strided = torch.ones(2, 3, 5, 20)[..., ::2]
    yield (strided, k, positions, inv_freq), r"q: expected stride 1 in the last dimension"
    yield (q, k, positions.int(), inv_freq), r"positions: expected int64 \[5\] or \[2, 5\], got i"
    yield (q, k, positions[:4], inv_freq), r"positions: expected .*got int64 \[4\]"
    yield (q, k, positions, inv_freq.float()), r"inv_freq: expected float64 \[4\].*got float32"
    yield (q, k, positions, torch.ones(6).double()), r"inv_freq: expected 1 to 5 frequencies.*got 6"
    yield (q, k, positions, torch.ones(0).double()), r"inv_freq: expected .*got"
    yield (q, k, positions, inv_freq[:1].expand(3, 4)), r"inv_freq: expected .*\[2, 4\], got"
    yield (q, k, positions, inv_freq * math.nan), r"inv_freq: expected finite frequencies, got NaN"
    yield (q, k, positions, inv_freq / 0), r"inv_freq: expected finite frequencies, got infinity"
    yield (q, k, positions, inv_freq, 2), r"base_inv_freq: required with start_tokens"
    yield (q, k, positions, inv_freq, -1, base), r"start_tokens: expected 0 or more, got -1"
    yield (q, k, positions, inv_freq, start - 1, base), r"start_tokens: expected 0 or more, got -1"
    yield (q, k, positions, inv_freq, start[:1], base), r"start_tokens: expected an int or int64"
    yield (q, k, positions, inv_freq, 1, base[:3]), r"base_inv_freq: expected float64 \[4\]"
    yield (q, k, positions, inv_freq, 0, None, math.nan), r"attention_factor: expected a finite"
    yield (q, k, positions, inv_freq, 0, None, factor[:1].expand(3)), r"attention_factor: expected"
    yield (q, k, positions, inv_freq, 0, None, factor / 0), r"attention_factor: expected finite"


@pytest.mark.parametrize("function", [ops.rope, ops.rope_])
@pytest.mark.parametrize(("arguments", "message"), list(wrong_inputs()))
def test_wrong_inputs(function, arguments, message):
    """Each gets one sentence that names the argument, what was expected and what came."""
    with pytest.raises(ValueError, match=message) as error:
        function(*arguments)
    assert "\n" not in str(error.value).split("Exception raised from")[0].strip()


def test_writing_in_place_is_refused_where_it_would_be_wrong():
    q, k, positions, inv_freq, *_ = problem(torch.float32)
    with pytest.raises(ValueError, match=r"k: expected memory apart from q's"):
        ops.rope_(q, q, positions, inv_freq)
    with pytest.raises(ValueError, match=r"q: expected memory without overlap"):
        ops.rope_(q[:, :1].expand(-1, 3, -1, -1), k, positions, inv_freq)
    with pytest.raises(ValueError, match=r"rope_: writes in place and has no gradient"):
        ops.rope_(q.requires_grad_(), k, positions, inv_freq)


def test_fuzz():
    """Arguments at random: the result is the reference's, or one sentence, never a crash."""
    generator = random.Random(0)
    accepted = refused = 0
    for _ in range(400):
        batch, tokens, head_dim = (generator.choice([0, 1, 2, 3, 8]) for _ in range(3))
        dtype = generator.choice([torch.float32, torch.bfloat16, torch.float64, torch.int8])

        def tensor(*shape, dtype=dtype):
            shape = [generator.choice([n, n, n, n, n, n, n, 1]) for n in shape]
            return torch.randint(-3, 4, shape).to(dtype)

        q, k = tensor(batch, 2, tokens, head_dim), tensor(batch, 1, tokens, head_dim)
        positions = tensor(*generator.choice([(tokens,), (batch, tokens)]), dtype=torch.int64)
        pairs = generator.choice([head_dim // 2, 1, 2])
        inv_freq = tensor(*generator.choice([(pairs,), (batch, pairs)]), dtype=torch.float64)
        start = generator.choice([0, 0, 1, 2**62, -1, tensor(batch, dtype=torch.int64)])
        base = generator.choice([None, tensor(pairs, dtype=torch.float64)])
        factor = generator.choice([1.0, 0.5, math.inf, tensor(batch, dtype=torch.float64)])
        arguments = (q, k, positions, inv_freq, start, base, factor)
        try:
            got = ops.rope(*arguments)
        except ValueError as error:
            refused += 1
            assert ": " in str(error)
            continue
        accepted += 1
        torch.testing.assert_close(got, ops.reference.rope(*arguments))
    assert accepted > 20 and refused > 20


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_fuzz_of_the_bindings():
    """Any shapes, dtypes, layouts, devices and overlaps are computed or refused by every op."""
    choose = random.Random(1).choice
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.complex64]

    def tensor(*shape, dtypes=dtypes):
        """Mostly as asked."""
        size = [choose([n] * 90 + [0, 1, 5]) for n in shape]
        size = size[choose([0] * 90 + [1]) :]
        t = torch.randint(-3, 4, size).to(choose(dtypes))
        if choose([False] * 30 + [True]) and t.dim() > 1:
            t = t.transpose(0, -1)
        if choose([False] * 30 + [True]) and t.dim():
            t = t[:1].expand(t.shape)
        kind = choose(["dense"] * 90 + ["meta", "sparse", "csr"])
        if kind == "meta":
            return t.to("meta")
        if kind == "csr" and t.dim() == 2:
            return t.to_sparse_csr()
        return t.to_sparse() if kind == "sparse" else t

    op = torch.ops.longrope
    double, integer = [torch.float64] * 40 + dtypes, [torch.int64] * 40 + dtypes
    refused = computed = 0
    for _ in range(500):
        batch, tokens, head_dim = choose([1, 2]), choose([1, 3]), choose([2, 6, 8])
        same = [choose(dtypes[:3])] * 20 + dtypes
        pairs = choose([1, head_dim // 2, head_dim // 2])
        q, gq = (tensor(batch, 2, tokens, head_dim, dtypes=same) for _ in range(2))
        k, gk = (tensor(batch, 1, tokens, head_dim, dtypes=same) for _ in range(2))
        k = choose([k] * 9 + [q])
        positions = tensor(tokens, dtypes=integer)
        frequencies = tensor(pairs, dtypes=double)
        base = choose([None, tensor(batch, pairs, dtypes=double)])
        rows = choose([None, None, tensor(batch, dtypes=integer)])
        factor_rows = choose([None, None, tensor(batch, dtypes=double)])
        turned_by = (positions, frequencies, base, choose([0, 0, 2, -1]), rows, 1.0, factor_rows)
        sets = (positions, frequencies, base, 0, tensor(pairs, dtypes=double), None, 0, 1.0)
        sets += (choose([None, None, tensor(1, dtypes=double)]), True)
        for call, arguments in (
            (op.rope, (q, k, *turned_by, True, False)),
            (op.rope_, (q, k, *turned_by, False)),
            (op.rope_backward, (gq, gk, q, k, *turned_by, False, True)),
            (op.rerotate, (k, *sets)),
            (op.rerotate_, (k, *sets)),
            (op.rerotate_out, (k, *sets, choose([gk, k]))),
        ):
            try:
                call(*arguments)
                computed += 1
            except (ValueError, RuntimeError, NotImplementedError, IndexError):
                refused += 1
    assert computed > 300 and refused > 300, (computed, refused)
