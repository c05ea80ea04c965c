"""Which kernels attend where nothing turns inside, and that both compute the same."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from longrope import ops
from longrope.patching import plain_attention
from longrope.patching.plain_attention import _is_ahead, attend
from longrope.patching.torch_attention import attend_unmasked


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "queries", "keys"),
    [(2, 2, 9, 9), (4, 2, 9, 9), (4, 2, 5, 12), (4, 1, 1, 12)],
)
def test_torch_computes_the_same(heads, kv_heads, queries, keys, causal):
    """Whole windows, chunks on a cache, decoding, shared keys: values and gradients."""
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    tensors = [torch.randn(2, h, n, 16, requires_grad=True) for h, n in shapes]
    grad = torch.randn(2, heads, queries, 16)
    results = []
    for out in (
        attend(*tensors, causal=causal, scale=0.3),
        attend_unmasked(*tensors, causal, 0.3),
    ):
        results.append((out, *torch.autograd.grad(out, tensors, grad)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (12, 0)])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_ours_where_it_is_measured_to_be_ahead(monkeypatch, dtype, capability, head_dim):
    """Not for a few queries, with gradients only behind other keys, and never in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(plain_attention, "_has_wgmma", lambda: True)
    plain = torch.zeros(1, 66, 128, head_dim, dtype=dtype)
    asks = plain.clone().requires_grad_()
    ahead = dtype != torch.float32 and capability == (9, 0)
    assert _is_ahead(plain, plain, plain) is ahead
    assert not _is_ahead(plain[:, :, :1], plain, plain)
    assert not _is_ahead(plain[:, :65], plain, plain)  # blocks that leave half of the chip idle
    for tensors in ((asks, plain, plain), (plain, asks, plain), (plain, plain, asks)):
        assert not _is_ahead(*tensors)
        with torch.no_grad():
            assert _is_ahead(*tensors) is ahead
    before = plain.repeat(1, 1, 2, 1)
    assert _is_ahead(asks, before, before) is (ahead and head_dim <= 128)
    assert not _is_ahead(asks, before, before, False)  # torch has more than flash for these
    assert not _is_ahead(asks, before[:, :32], before[:, :32])  # too few blocks of keys
    monkeypatch.setattr(plain_attention, "_has_wgmma", lambda: False)
    assert not _is_ahead(plain, plain, plain)


def test_few_queries_in_float32_on_keys_that_heads_share_are_ours():
    """Torch would copy the keys for every head."""
    query, shared, own = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 9, 8), torch.zeros(1, 4, 9, 8)
    assert _is_ahead(query, shared, shared) and not _is_ahead(query, own, own)
    assert not _is_ahead(query.bfloat16(), shared.bfloat16(), shared.bfloat16())


@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 2.0}, {}])
def test_what_torch_cannot_do_is_ours(monkeypatch, options):
    """Also on a chip where torch's kernels are faster."""
    asked = []

    monkeypatch.setattr(plain_attention, "_is_ahead", lambda *tensors: False)
    monkeypatch.setattr(plain_attention, "attend_unmasked", lambda *a: asked.append("torch"))
    monkeypatch.setattr(ops, "attention", lambda *a, **k: asked.append("ours"))
    attend(*on_gpu(1, 8), **options)
    assert asked == (["ours"] if options else ["torch"])


def on_gpu(queries, keys):
    """What `attend` asks of queries, keys and values before it chooses."""
    return [SimpleNamespace(is_cuda=True, shape=(1, 1, n, 8)) for n in (queries, keys, keys)]


@pytest.mark.parametrize("compiling", [False, True])
@pytest.mark.parametrize(
    ("queries", "keys", "causal", "expected"),
    [
        (1, 9, True, "torch"), (9, 9, True, "torch"), (4, 9, False, "torch"),
        (9, 4, False, "torch"), (9, 4, True, "ours"), (4, 9, True, None),
    ],
)  # fmt: skip
def test_torch_attends_where_it_needs_no_mask(
    monkeypatch, compiling, queries, keys, causal, expected
):
    """A chunk on a cache has one where it is compiled; queries before all keys are ours: 0."""
    asked = []
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    monkeypatch.setattr(plain_attention, "_is_ahead", lambda *tensors: False)
    monkeypatch.setattr(plain_attention, "attend_unmasked", lambda *a: asked.append("torch"))
    monkeypatch.setattr(ops, "attention", lambda *a, **k: asked.append("ours"))
    attend(*on_gpu(queries, keys), causal=causal)
    assert asked == [expected or ("ours" if compiling else "torch")]


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_chunk_on_a_cache_compiles_without_a_graph_break(dynamic):
    def attention(q, k):
        return attend_unmasked(q, k, k, True, 0.3)

    q, k = torch.randn(2, 4, 5, 16), torch.randn(2, 2, 12, 16)
    compiled = torch.compile(attention, backend="eager", fullgraph=True, dynamic=dynamic)
    torch.testing.assert_close(compiled(q, k), attention(q, k))


@pytest.mark.parametrize(
    ("dtype", "head_dim", "shares"),
    [
        (torch.bfloat16, 128, True), (torch.float16, 192, True),
        (torch.bfloat16, 256, False), (torch.float32, 64, False),
    ],
)  # fmt: skip
def test_torch_is_asked_to_share_keys_where_flash_is(monkeypatch, dtype, head_dim, shares):
    """Elsewhere each head gets its keys: sharing would take the matrix of all scores."""
    asked = {}

    def attention(query, key, value, **options):
        asked.update(options, heads=(key.shape[1], value.shape[1]), key=key)
        return query

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    keys = torch.arange(2.0).repeat_interleave(9 * head_dim).reshape(1, 2, 9, head_dim)
    attend_unmasked(
        torch.zeros(1, 6, 9, head_dim, dtype=dtype), keys.to(dtype), keys.to(dtype), True, None
    )
    assert asked.get("enable_gqa", False) is shares
    assert asked["heads"] == ((2, 2) if shares else (6, 6))
    assert asked["key"][0, :, 0, 0].tolist() == ([0, 1] if shares else [0, 0, 0, 1, 1, 1])
