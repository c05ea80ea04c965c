"""Frequencies and attention factors by group of heads, in every op that turns."""

from __future__ import annotations

import pytest
import torch
from support.threads import threads

from longrope import RescaleFactors, ops

BATCH, HEADS, KV_HEADS, TOKENS, HEAD_DIM, PAIRS = 2, 6, 3, 21, 32, 12


def problem(batch=BATCH, dtype=torch.float32):
    """Return q, k, and the arguments of ops.rope; `batch` rows of frequencies."""
    q = torch.randn(BATCH, HEADS, TOKENS, HEAD_DIM, dtype=dtype)
    k = torch.randn(BATCH, TOKENS, KV_HEADS, HEAD_DIM, dtype=dtype).transpose(1, 2)
    positions = torch.randint(-5, 2**20, (BATCH, TOKENS))
    positions[:, :8] = torch.arange(8)
    inv_freq = torch.rand(batch, KV_HEADS, PAIRS, dtype=torch.float64) + 1e-4
    base = torch.rand(PAIRS, dtype=torch.float64)
    factor = torch.rand(batch, KV_HEADS, dtype=torch.float64) + 0.5
    return q, k, (positions, inv_freq, torch.tensor([3, 0]), base, factor)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_against_the_specification(backend, batch, interleaved):
    q, k, arguments = problem(batch)
    there = [t.to(backend.device) for t in (q, k, *arguments)]
    expected = ops.reference.rope(q, k, *arguments, interleaved)
    for got, wanted in zip(ops.rope(*there, interleaved), expected, strict=True):
        torch.testing.assert_close(got.cpu(), wanted)
    q_there, k_there = (t.clone() for t in there[:2])
    ops.rope_(q_there, k_there, *there[2:], interleaved)
    torch.testing.assert_close(q_there.cpu(), expected[0])
    torch.testing.assert_close(k_there.cpu(), expected[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_each_head_turns_as_alone(dtype):
    """Bit for bit: query head h with the frequencies of key head h // (H / Hk)."""
    q, k, (positions, inv_freq, start, base, factor) = problem(dtype=dtype)
    q_turned, k_turned = ops.rope(q, k, positions, inv_freq, start, base, factor)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        own = (positions, inv_freq[:, group].contiguous(), start, base, factor[:, group])
        key = slice(group, group + 1)
        alone = ops.rope(q[:, head : head + 1], k[:, key], *own)
        assert torch.equal(q_turned[:, head : head + 1], alone[0])
        assert torch.equal(k_turned[:, key], alone[1])


def test_equal_frequencies_are_those_without_groups():
    q, k, (positions, inv_freq, start, base, _) = problem(dtype=torch.bfloat16)
    same = inv_freq[:, :1].expand(-1, KV_HEADS, -1)
    for got, expected in zip(
        ops.rope(q, k, positions, same, start, base, 1.25),
        ops.rope(q, k, positions, inv_freq[:, 0].contiguous(), start, base, 1.25),
        strict=True,
    ):
        assert torch.equal(got, expected)


def test_relative_positions_stay_exact():
    """What a query makes of a key depends on their distance alone, in each group."""
    q, k, (_, inv_freq, *_) = problem(1, torch.float64)
    scores = []
    for shift in (0, 2**20):
        at = torch.arange(TOKENS) + shift
        turned = ops.rope(q, k, at, inv_freq)
        scores.append(turned[0] @ turned[1].repeat_interleave(HEADS // KV_HEADS, 1).mT)
    torch.testing.assert_close(*scores)


@pytest.mark.parametrize("batch", [1, BATCH])
def test_gradients(backend, batch):
    """Of q, k, both frequencies and the factors; a factor [B] sums over the groups."""
    q, k, (positions, inv_freq, start, base, factor) = problem(batch)
    positions = positions % 40
    for factors in (factor, torch.tensor([1.1, 0.9], dtype=torch.float64)):
        grads = []
        for rope, device in ((ops.rope, backend.device), (ops.reference.rope, "cpu")):
            leaves = [
                t.detach().clone().to(device).requires_grad_()
                for t in (q, k, inv_freq, base, factors)
            ]
            turned = rope(
                *leaves[:2], positions.to(device), leaves[2], start.to(device), *leaves[3:]
            )
            weights = torch.arange(TOKENS, device=device)[:, None]
            loss = sum((weights * x.sin()).sum() for x in turned)
            grads.append([g.cpu() for g in torch.autograd.grad(loss, leaves)])
        for got, expected in zip(*grads, strict=True):
            assert got.shape == expected.shape
            torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-3)


def test_the_same_for_any_number_of_threads():
    q, k, arguments = problem()
    found = []
    for count in (1, 3):
        with threads(count):
            leaf = arguments[1].clone().requires_grad_()
            turned = ops.rope(q, k, arguments[0], leaf, *arguments[2:])
            found.append((*turned, torch.autograd.grad(turned[0].sum(), leaf)[0]))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def sets():
    """Return factors of one layer: shared ones, and those of KV_HEADS heads with start tokens."""
    sizes = {"original_length": 256, "target_length": 2048, "rotary_dim": 2 * PAIRS}
    shared = RescaleFactors.yarn(**sizes)
    own = shared.spread(1, KV_HEADS)
    return shared, own.replace(
        lambdas=own.lambdas * torch.linspace(1, 2, KV_HEADS).numpy()[None, :, None],
        attention_factor=own.attention_factor * [[1.0, 1.5, 2.0]],
        start_tokens=4,
    )


@pytest.mark.parametrize("swap", [False, True])
def test_rerotate(backend, swap):
    _, k, (positions, *_) = problem()
    pair = sets()[::-1] if swap else sets()
    k_there, at = k.to(backend.device).requires_grad_(), positions.to(backend.device)
    got = ops.rerotate(k_there, at, *pair)
    k_here = k.clone().requires_grad_()
    expected = ops.reference.rerotate(k_here, positions, *pair)
    torch.testing.assert_close(got.cpu(), expected)
    grads = (torch.autograd.grad(x.sin().sum(), y)[0] for x, y in ((got, k_there),
                                                                   (expected, k_here)))  # fmt: skip
    torch.testing.assert_close(*(g.cpu() for g in grads))


def test_rerotate_rows(backend):
    _, k, (positions, _, _, base, _) = problem()
    for batch in (1, BATCH):
        inv_freq = torch.rand(batch, KV_HEADS, 3, PAIRS, dtype=torch.float64)
        factors = torch.rand(batch, KV_HEADS, 3, dtype=torch.float64) + 0.5
        arguments = (
            positions, torch.tensor([-1, 2]), torch.tensor([1, 0]), inv_freq,
            torch.tensor([2, 0, 3]), base, factors,
        )  # fmt: skip
        there = [t.to(backend.device) for t in (k.clone(), *arguments)]
        expected = ops.reference.rerotate_rows_(k.clone(), *arguments)
        torch.testing.assert_close(ops.rerotate_rows_(*there).cpu(), expected)


@pytest.mark.parametrize("limits", [None, torch.tensor([6, 12, 40])])
@pytest.mark.parametrize("batch", [1, BATCH])
def test_attention_turns_by_group(batch, limits):
    """With the gradient of everything, and tiers of which the query picks one."""
    tiers = () if limits is None else (3,)
    q, k, _ = problem(dtype=torch.float64)
    v = torch.randn(BATCH, KV_HEADS, TOKENS, HEAD_DIM, dtype=torch.float64)
    inv_freq = torch.rand(batch, KV_HEADS, *tiers, PAIRS, dtype=torch.float64)
    factor = torch.rand(batch, KV_HEADS, *tiers, dtype=torch.float64) + 0.5
    base = torch.rand(PAIRS, dtype=torch.float64)
    at = torch.arange(TOKENS)
    query_start = torch.tensor([0, -2])
    found = []
    for attention in (ops.attention, ops.reference.attention):
        leaves = [t.clone().requires_grad_() for t in (q, k, v, inv_freq, factor)]
        rotation = ops.Rotation(leaves[3], at, at, 2, base, leaves[4], limits=limits)
        out, lse = attention(
            *leaves[:3], rotation=rotation, return_lse=True, query_start=query_start
        )
        seen = lse.detach().isfinite()
        loss = out.sin().sum() + lse[seen].sum()
        found.append((out, lse, *torch.autograd.grad(loss, leaves)))
    for got, expected in zip(*found, strict=True):
        torch.testing.assert_close(got, expected)


def test_torch_library():
    q, k, (positions, inv_freq, start, base, factor) = problem()
    turned_by = (positions, inv_freq, base, 0, start, 1.0, factor, False)
    leaves = (q.requires_grad_(), k, positions, inv_freq.requires_grad_(), *turned_by[2:], False)
    torch.library.opcheck(torch.ops.longrope.rope, leaves)
    q, inv_freq = q.detach(), inv_freq.detach()
    turned_by = (positions, inv_freq, base, 0, start, 1.0, factor, False)
    torch.library.opcheck(torch.ops.longrope.rope_backward, (q, k, q, k, *turned_by, False))
    first = (q[:1], k[:1], q[:1], k[:1], positions[:1], inv_freq[:1], base, 0, None, 1.0)
    torch.library.opcheck(torch.ops.longrope.rope_backward, (*first, factor[:1], False, False))
    one = (inv_freq[:1], None, 0, inv_freq[1, 0], base, 2, 1.0, factor[:1], False)
    torch.library.opcheck(torch.ops.longrope.rerotate, (k.requires_grad_(), positions, *one))


def test_compiles_into_one_graph():
    def loss(q, k, positions, inv_freq, start, base, factor):
        q, k = ops.rope(q, k, positions, inv_freq, start, base, factor)
        return (q.sum(1) * k.sum(1)).square().sum()

    q, k, arguments = problem()
    leaves = [t.requires_grad_() for t in (q, k, arguments[1], arguments[4])]
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got = torch.autograd.grad(compiled(q, k, *arguments), leaves)
    torch.testing.assert_close(got, torch.autograd.grad(loss(q, k, *arguments), leaves))


@pytest.mark.parametrize("rope", [ops.rope, ops.reference.rope])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"inv_freq": torch.rand(BATCH, 4, PAIRS).double()}, "inv_freq: expected .* part evenly"),
        ({"inv_freq": torch.rand(3, KV_HEADS, PAIRS).double()}, "inv_freq: expected .*, got"),
        ({"inv_freq": torch.rand(1, KV_HEADS, PAIRS)}, "inv_freq: expected float64"),
        ({"attention_factor": torch.rand(1, 2)}, "attention_factor: expected"),
        ({"inv_freq": torch.rand(PAIRS).double()}, "attention_factor: expected"),
    ],
)
def test_refusals(rope, change, message):
    q, k, arguments = problem()
    names = ("positions", "inv_freq", "start_tokens", "base_inv_freq", "attention_factor")
    with pytest.raises(ValueError, match=f"^{message}"):
        rope(q, k, **dict(zip(names, arguments, strict=True)) | change)


def test_rerotate_wants_one_layer():
    _, k, (positions, *_) = problem()
    shared, own = sets()
    with pytest.raises(ValueError, match=r"^to_factors: expected the factors of one layer"):
        ops.rerotate(k, positions, shared, shared.spread(2, KV_HEADS) * shared)
    assert own.layer(0) == own
