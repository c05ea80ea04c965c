"""What bench_attention.py times of decoding: few queries on a long cache, on CPU, beside peers.

The baseline is a read of K and V, once, by as many threads: no attention can be faster.
"""

from __future__ import annotations

import numpy
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from longrope import ops

#: Batch, H, Hk, queries, keys, D: Llama 3's heads, SmolLM2's, and heads that share no keys.
CASES = [
    (1, 32, 8, 1, 16384, 128), (4, 32, 8, 1, 4096, 128), (1, 32, 8, 4, 16384, 128),
    (1, 32, 8, 16, 16384, 128), (1, 9, 3, 1, 16384, 64), (1, 16, 16, 1, 8192, 64),
    (1, 16, 16, 1, 2048, 40), (1, 32, 8, 1, 131072, 128),
]  # fmt: skip
PEERS = ("sdpa", "flex", "onnxruntime")


def inputs(case, dtype):
    """Return q, k and v of a case."""
    batch, heads, kv_heads, queries, keys, head_dim = case
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [torch.randn(batch, h, n, head_dim).to(dtype) for h, n in shapes]


def gigabytes(case, dtype):
    """Return what K and V hold, in 1e9 bytes."""
    batch, _, kv_heads, _, keys, head_dim = case
    return 2 * batch * kv_heads * keys * head_dim * dtype.itemsize / 1e9


def by_torch(q, k, v):
    """Return torch's SDPA: without a mask where one query sees all, else with one."""
    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if queries > 1:
        mask = torch.ones(queries, keys, dtype=torch.bool, device=q.device).tril(keys - queries)
    grouped = {"enable_gqa": True} if k.shape[1] < q.shape[1] else {}
    return lambda: sdpa(q, k, v, attn_mask=mask, **grouped)


def by_flex_attention(q, k, v):
    """Return torch's FlexAttention, compiled; its causal mask counts from the first key."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    queries, keys = q.shape[2], k.shape[2]
    mask = None
    if queries > 1:
        mask = create_block_mask(
            lambda b, h, i, j: j <= i + keys - queries, None, None, queries, keys, device=q.device
        )
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=k.shape[1] < q.shape[1])


def by_onnxruntime(q, k, v):
    """Return onnxruntime's GroupQueryAttention on a cache that it writes the last keys into.

    Its cache holds every key but those of the queries, which come beside them and are stored where
    the cache ends: no copy of it is made.
    """
    import onnxruntime
    from onnx import TensorProto, helper

    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    types = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16}
    kind = types[q.dtype]
    names = "query", "key", "value", "past_key", "past_value", "seqlens_k", "total"
    node = helper.make_node(
        "GroupQueryAttention", names, ["output", "present_key", "present_value"],
        domain="com.microsoft", num_heads=heads, kv_num_heads=kv_heads,
    )  # fmt: skip
    cache = batch, kv_heads, keys, head_dim
    flat = {n: (batch, queries, h * head_dim)
            for n, h in zip(names, (heads, kv_heads, kv_heads), strict=False)}  # fmt: skip
    shapes = flat | {"past_key": cache, "past_value": cache}
    graph = helper.make_graph(
        [node], "attention",
        [*(helper.make_tensor_value_info(n, kind, s) for n, s in shapes.items()),
         helper.make_tensor_value_info("seqlens_k", TensorProto.INT32, (batch,)),
         helper.make_tensor_value_info("total", TensorProto.INT32, (1,))],
        [helper.make_tensor_value_info("output", kind, flat["query"]),
         helper.make_tensor_value_info("present_key", kind, cache),
         helper.make_tensor_value_info("present_value", kind, cache)],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(
        helper.make_model(graph, opset_imports=opsets, ir_version=8).SerializeToString(), options,
        providers=["CPUExecutionProvider"],
    )  # fmt: skip

    def value(x):
        return onnxruntime.OrtValue.ortvalue_from_numpy(numpy.ascontiguousarray(x))

    def tokens(x):
        return x.transpose(1, 2).reshape(batch, queries, -1).numpy()

    held = {
        "query": value(tokens(q)),
        "key": value(tokens(k[:, :, -queries:])),
        "value": value(tokens(v[:, :, -queries:])),
        "past_key": value(k.numpy()),
        "past_value": value(v.numpy()),
        "seqlens_k": value(numpy.full(batch, keys - 1, numpy.int32)),
        "total": value(numpy.array([keys], numpy.int32)),
        "output": value(numpy.empty(flat["query"], tokens(q).dtype)),
    }
    binding = session.io_binding()
    for name in names:
        binding.bind_ortvalue_input(name, held[name])
    binding.bind_ortvalue_output("output", held["output"])
    binding.bind_ortvalue_output("present_key", held["past_key"])
    binding.bind_ortvalue_output("present_value", held["past_value"])

    def call():
        session.run_with_iobinding(binding)
        out = torch.from_numpy(held["output"].numpy())
        return out.view(batch, queries, heads, head_dim).transpose(1, 2)

    return call


def rotations(q, k, pairs):
    """Return the rotation inside, by name: one set; tiers whose start tokens keep their own."""
    keys = torch.arange(k.shape[2])
    queries = keys[-q.shape[2] :]
    base = 10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs)
    tiers = torch.stack([base, base / 2, base / 4, base / 8])
    limits = torch.tensor([2048, 4096, 8192, 2**40])
    return {
        "rotation inside": ops.Rotation(base, queries, keys),
        "rotation inside, 4 tiers, start tokens": ops.Rotation(
            tiers, queries, keys, start_tokens=16, base_inv_freq=base, limits=limits
        ),
    }


def implementations(case, dtype, peers=PEERS):
    """Return what computes a case by name, checked against each other, a read of K and V first."""
    q, k, v = inputs(case, dtype)
    words = [x.view(torch.int64) for x in (k, v)]
    named = {
        "read K and V": lambda: [w.sum() for w in words],
        "ops.attention": lambda: ops.attention(q, k, v),
    }
    for name, rotation in rotations(q, k, q.shape[-1] // 2).items():
        named[f"ops.attention, {name}"] = lambda r=rotation: ops.attention(q, k, v, rotation=r)
    makers = {"sdpa": by_torch, "flex": by_flex_attention, "onnxruntime": by_onnxruntime}
    titles = {"sdpa": "torch SDPA", "flex": "torch FlexAttention",
              "onnxruntime": "onnxruntime GroupQueryAttention"}  # fmt: skip
    expected = named["ops.attention"]().float()
    for peer in peers:
        try:
            call = makers[peer](q, k, v)
            error = (call().float() - expected).abs().max().item()
        except Exception as why:  # a peer that is missing, or does not take these inputs
            reason = (str(why).strip() or repr(why)).splitlines()[0]
            print(f"{titles[peer]}: skipped, {reason[:120]}")
            continue
        assert error < (1e-4 if dtype == torch.float32 else 2e-2), (titles[peer], error)
        named[titles[peer]] = call
    return named
