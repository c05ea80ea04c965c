"""Which kernels attend where nothing turns inside, and that both compute the same."""

from __future__ import annotations

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
    """Not with gradients, not for a few queries, and never in float32."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    plain = torch.zeros(1, 1, 128, head_dim, dtype=dtype)
    asks = plain.clone().requires_grad_()
    ahead = dtype != torch.float32 and capability == (9, 0)
    assert _is_ahead(plain, plain, plain) is ahead
    assert not _is_ahead(plain[:, :, :1], plain, plain)
    for tensors in ((asks, plain, plain), (plain, asks, plain), (plain, plain, asks)):
        assert not _is_ahead(*tensors)
        with torch.no_grad():
            assert _is_ahead(*tensors) is ahead


@pytest.mark.parametrize("options", [{"window": 3}, {"softcap": 2.0}, {}])
def test_what_torch_cannot_do_is_ours(monkeypatch, options):
    """Also on a chip where torch's kernels are faster."""
    asked = []

    class OnGpu:
        is_cuda = True

    monkeypatch.setattr(plain_attention, "_is_ahead", lambda *tensors: False)
    monkeypatch.setattr(plain_attention, "attend_unmasked", lambda *a: asked.append("torch"))
    monkeypatch.setattr(ops, "attention", lambda *a, **k: asked.append("ours"))
    attend(OnGpu(), OnGpu(), OnGpu(), **options)
    assert asked == (["ours"] if options else ["torch"])
