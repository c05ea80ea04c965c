"""ops.attention of one to a few queries over a cache, as in generation, on every backend."""

from __future__ import annotations

import pytest
import torch
from support.criterion import assert_as_accurate
from support.views import moved

from longrope import ops

DTYPES = [torch.bfloat16, torch.float16]

#: (H, Hk, N, M, D) and the arguments of ops.attention. The kernel for few rows takes up to 16 of
#: them (queries times H / Hk), keys by 16 for each of 2 or 4 warps, and parts of the keys.
CASES = {
    "one query of one head": ((1, 1, 1, 100, 64), {}),
    "fewer keys than a tile": ((4, 2, 1, 5, 64), {}),
    "one key": ((2, 1, 1, 1, 128), {}),
    "keys for some warps alone": ((8, 1, 1, 33, 96), {}),
    "parts of the keys": ((8, 2, 1, 700, 128), {}),
    "16 rows, the most": ((8, 2, 4, 190, 64), {}),
    "17 rows, by the other kernel": ((17, 1, 1, 190, 64), {}),
    "16 queries without a group": ((2, 2, 16, 150, 128), {}),
    "a window": ((6, 2, 5, 160, 96), {"window": 37}),
    "a window that begins inside a tile": ((6, 2, 5, 160, 64), {"window": 70, "causal": False}),
    "softcap": ((4, 1, 3, 140, 200), {"softcap": 2.0, "scale": 0.5}),
    "a negative scale": ((4, 2, 2, 90, 256), {"scale": -0.2}),
    "head_dim 13": ((4, 2, 3, 90, 13), {}),
}


def on(device, arguments):
    def there(a):
        if isinstance(a, ops.Rotation):
            return ops.Rotation(**{n: there(x) for n, x in vars(a).items()})
        if isinstance(a, tuple):
            return tuple(there(x) for x in a)
        return a.to(device) if torch.is_tensor(a) else a

    return {n: there(a) for n, a in arguments.items()}


def check(backend, tensors, arguments):
    exact = ops.reference.attention(*(t.double() for t in tensors), **arguments, return_lse=True)
    low = ops.reference.attention(*tensors, **arguments, return_lse=True)
    there = [t.to(backend.device) for t in tensors]
    got = ops.attention(*there, **on(backend.device, arguments), return_lse=True)
    for name, *three in zip(("out", "lse"), got, low, exact, strict=True):
        # Weights are rounded once before they are multiplied: relative to the largest result.
        eps = torch.finfo(three[0].dtype).eps
        size = three[2].masked_fill(~three[2].isfinite(), 0).abs()
        floor = (2 * eps * size + eps * size.max())[three[2].isfinite()]
        assert_as_accurate(*three, floor=floor, name=name)
    return got


def heads(batch, h, hk, n, m, d, dtype):
    shapes = ((h, n), (hk, m), (hk, m))
    return [torch.randn(batch, a, b, d).to(dtype) for a, b in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_accuracy(backend, case, dtype):
    shape, arguments = case
    check(backend, heads(1, *shape, dtype), arguments)


def test_rows_of_the_batch_have_lengths_of_their_own(backend):
    """One has no key at all, and what lies behind the lengths is NaN."""
    q, k, v = heads(4, 4, 2, 2, 300, 64, torch.bfloat16)
    lengths = torch.tensor([300, 0, 17, 140])
    for row, length in enumerate(lengths.tolist()):
        k[row, :, length:] = v[row, :, length:] = float("nan")
    arguments = {"key_length": lengths, "query_start": (lengths - 2).clamp(0)}
    out, lse = check(backend, [q, k, v], arguments)
    assert (out[1] == 0).all() and (lse[1] == -torch.inf).all()


def test_queries_that_do_not_attend(backend):
    q, k, v = heads(2, 4, 2, 4, 90, 64, torch.bfloat16)
    ranges = (torch.tensor([1, 0]), torch.tensor([3, 0]))
    check(backend, [q, k, v], {"query_range": ranges})


def test_views_and_padded_rows(backend):
    """A cache whose rows do not begin at multiples of 16 bytes, and one that another owns."""
    q, k, v = heads(2, 4, 2, 1, 70, 64, torch.bfloat16)
    wide = [torch.randn(2, 70, 2, 67).bfloat16() for _ in range(2)]
    for whole, part in zip(wide, (k, v), strict=True):
        whole[..., 3:] = part.transpose(1, 2)
    dense = check(backend, [q, k, v], {})
    unaligned = [moved(w[..., 3:].transpose(1, 2), backend.device) for w in wide]
    got = ops.attention(q.to(backend.device), *unaligned, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(got, dense, strict=True))
    one = [t.to(backend.device)[:1].expand(2, -1, -1, -1) for t in (k, v)]
    got = ops.attention(q.to(backend.device), *one)
    copies = [t.clone() for t in one]
    assert torch.equal(got, ops.attention(q.to(backend.device), *copies))


def rotation(batch, n, m, pairs, tiers=1, **changes):
    """Positions far out, tiers that differ in everything, a range of start tokens in each row."""
    keys = torch.arange(m) + torch.tensor([[0], [2**20]])[:batch]
    arguments = {
        "inv_freq": torch.rand(tiers, pairs, dtype=torch.float64),
        "query_positions": keys[:, m - n :],
        "key_positions": keys,
        "start_tokens": torch.full((tiers,), 9),
        "base_inv_freq": torch.rand(pairs, dtype=torch.float64),
        "attention_factor": torch.rand(tiers, dtype=torch.float64) + 0.5,
    }
    if tiers > 1:
        arguments["limits"] = torch.tensor([40, m - 2, 2**40])[:tiers]
    else:
        first = {name: arguments[name][0] for name in ("inv_freq", "attention_factor")}
        arguments |= first | {"start_tokens": 9}
    return ops.Rotation(**(arguments | changes))


@pytest.mark.parametrize(
    ("shape", "pairs", "changes"),
    [
        ((8, 2, 1, 150, 64), 32, {}),
        ((8, 2, 1, 150, 128), 64, {"interleaved": True}),
        ((4, 4, 3, 75, 64), 16, {}),  # half of the columns turn
        ((4, 2, 2, 75, 80), 40, {"interleaved": True}),
        ((4, 2, 1, 75, 256), 128, {}),
        ((4, 2, 1, 75, 72), 36, {}),  # no multiple of 8 pairs: turned beforehand
        ((4, 2, 1, 75, 20), 10, {}),  # and rows that do not end at 16 bytes
        ((2, 1, 4, 90, 64), 32, {"tiers": 3}),  # queries of a row in several tiers
    ],
)
def test_keys_turn_where_they_are_read(backend, shape, pairs, changes):
    tensors = heads(2, *shape, torch.bfloat16)
    turned = rotation(2, shape[2], shape[3], pairs, **changes)
    check(backend, tensors, {"rotation": turned})


def test_turned_keys_equal_keys_that_were_turned_before(backend):
    """Each is rounded once, so nothing tells them apart."""
    q, k, v = heads(2, 8, 2, 1, 130, 64, torch.bfloat16)
    r = rotation(2, 1, 130, 32, base_inv_freq=None, start_tokens=0)
    given = on(backend.device, {"q": q, "k": k, "v": v, "rotation": r})
    inside = ops.attention(**given)
    r = given.pop("rotation")
    frequencies = {"inv_freq": r.inv_freq, "attention_factor": r.attention_factor}
    given["q"], _ = ops.rope(given["q"], given["q"], r.query_positions, **frequencies)
    given["k"], _ = ops.rope(given["k"], given["k"], r.key_positions, **frequencies)
    if backend.is_cuda:
        assert torch.equal(inside, ops.attention(**given))
    else:
        torch.testing.assert_close(inside, ops.attention(**given), rtol=1e-2, atol=1e-2)
