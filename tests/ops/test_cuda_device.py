"""What an actual GPU alone can show of our ops: streams, graphs, devices, sizes, views.

That results are right is tested over every backend (tests/ops/test_<op>.py). Each of these is
skipped, with what is missing, where it cannot run.
"""

from __future__ import annotations

import pytest
import torch
from support.views import moved

from longrope import _C, ops

HAS_GPU = torch.cuda.is_available() and bool(_C.build_info()["cuda"])
pytestmark = pytest.mark.skipif(
    not HAS_GPU, reason="needs a CUDA device and an extension with CUDA kernels"
)
two_devices = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def needs_memory(gib: int):
    """Skip unless the GPU has so much memory left."""
    free = torch.cuda.mem_get_info()[0] >> 30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free} are free")


def frequencies(pairs: int, device="cuda") -> torch.Tensor:
    return 1e4 ** (-torch.arange(pairs, dtype=torch.float64, device=device) / pairs)


def rope(dtype, device="cuda"):
    q, k = torch.randn(2, 4, 70, 64), torch.randn(2, 2, 70, 64)
    at = torch.arange(70, device=device)
    return [q, k], lambda q, k: ops.rope(q, k, at, frequencies(32, device)), dtype, device


def attention(dtype, device="cuda"):
    return made_attention(70, 70, dtype, device, {})


def attention_of_one_query(dtype, device="cuda"):
    """With parts of the keys, and keys that turn inside."""
    at = torch.arange(700, device=device)
    turned = ops.Rotation(
        inv_freq=frequencies(32, device), query_positions=at[-1:], key_positions=at
    )
    return made_attention(1, 700, dtype, device, {"rotation": turned})


def made_attention(queries, keys, dtype, device, arguments):
    tensors = [torch.randn(2, h, n, 64) for h, n in ((4, queries), (2, keys), (2, keys))]
    return tensors, lambda q, k, v: ops.attention(q, k, v, **arguments), dtype, device


def linear_nll(dtype, device="cuda"):
    """More columns than one chunk of the vocabulary."""
    targets = torch.randint(0, 1500, (70,), device=device)
    targets[3] = -100
    tensors = [torch.randn(70, 32), torch.randn(1500, 32) / 6]
    return tensors, lambda hidden, weight: ops.linear_nll(hidden, weight, targets), dtype, device


OPS = [rope, attention, attention_of_one_query, linear_nll]


def leaves_of(tensors, dtype, device):
    return [t.to(device, dtype).requires_grad_() for t in tensors]


def forward_and_backward(function, leaves):
    """Return outputs and gradients."""
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    weights = [torch.linspace(-1, 1, o.numel(), device=o.device).view_as(o).to(o) for o in outs]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, leaves, weights)]


def assert_same(one, other):
    for index, (a, b) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(a.cpu(), b.cpu()), f"result {index} differs"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_every_run_gives_the_same_bits(op, dtype):
    tensors, function, *there = op(dtype)
    leaves = leaves_of(tensors, *there)
    first = forward_and_backward(function, leaves)
    before = _C.cuda_launches()
    for _ in range(5):
        assert_same(first, forward_and_backward(function, leaves))
    assert _C.cuda_launches() > before


@pytest.mark.parametrize("op", OPS)
def test_a_graph_replays_with_new_contents(op):
    """Nothing waits for the device, and memory stays where it was."""
    tensors, function, *there = op(torch.bfloat16)
    inputs = [t.to(there[1], there[0]) for t in tensors]
    expected = [_outputs(function, inputs), _outputs(function, [-x for x in inputs])]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = function(*inputs)
    captured = captured if isinstance(captured, tuple) else (captured,)
    graph.replay()
    assert_same(captured, expected[0])
    for x in inputs:
        x.neg_()
    graph.replay()
    assert_same(captured, expected[1])


def _outputs(function, inputs):
    out = function(*inputs)
    return [o.clone() for o in (out if isinstance(out, tuple) else (out,))]


@pytest.mark.parametrize("op", OPS)
def test_compiled_by_inductor(op):
    tensors, function, *there = op(torch.bfloat16)
    plain = leaves_of(tensors, *there)
    again = leaves_of(tensors, *there)
    compiled = torch.compile(function, fullgraph=True)
    for got, right in zip(
        forward_and_backward(compiled, again), forward_and_backward(function, plain), strict=True
    ):
        torch.testing.assert_close(got, right)


def test_opcheck():
    q, k = torch.randn(2, 2, 9, 16, device="cuda"), torch.randn(2, 1, 9, 16, device="cuda")
    at, inv_freq = torch.arange(9, device="cuda"), frequencies(8)
    torch.library.opcheck(
        torch.ops.longrope.rope, (q, k, at, inv_freq, None, 0, None, 1.0, None, False, False)
    )
    bounds = (0, None, 0, None, 9, None, 0, None, 9, None)
    torch.library.opcheck(torch.ops.longrope.attention, (q, k, k, True, *bounds, 0, 0.25, 0.0))
    hidden, weight = torch.randn(9, 16, device="cuda"), torch.randn(30, 16, device="cuda")
    torch.library.opcheck(torch.ops.longrope.linear_nll, (hidden, weight, at, -100, None))


@pytest.mark.parametrize("op", OPS)
def test_kernels_go_to_the_current_stream(op):
    """Inputs are made, late, on a stream of their own; the default stream would read zeros."""
    tensors, function, *there = op(torch.bfloat16)
    right = [t.to(there[1], there[0]) for t in tensors]
    expected = _outputs(function, right)
    late = [torch.zeros_like(t) for t in right]
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda._sleep(50_000_000)  # cycles: kernels elsewhere are long through by then
        for to, value in zip(late, right, strict=True):
            to.copy_(value)
        got = _outputs(function, late)
    torch.cuda.synchronize()
    assert_same(got, expected)


@two_devices
@pytest.mark.parametrize("op", OPS)
def test_a_device_that_is_not_the_current_one(op):
    torch.manual_seed(1)
    tensors, function, *there = op(torch.bfloat16, "cuda:0")
    first = forward_and_backward(function, leaves_of(tensors, *there))
    torch.manual_seed(1)
    tensors, function, *there = op(torch.bfloat16, "cuda:1")
    second = forward_and_backward(function, leaves_of(tensors, *there))
    assert all(t.device == torch.device("cuda:1") for t in second)
    assert_same(first, second)


@two_devices
def test_tensors_of_two_devices_are_refused():
    q, k = (torch.randn(1, 1, 4, 8, device=f"cuda:{i}") for i in range(2))
    with pytest.raises(ValueError, match=r"k: expected .*cuda:0.*cuda:1"):
        ops.attention(q, k, k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", [rope, attention, attention_of_one_query])
def test_views_give_what_copies_give(op, dtype):
    """Rows that begin anywhere, heads behind tokens, and one row of the batch for all."""
    tensors, function, _, device = op(dtype)
    odd = [torch.randn(*t.shape[:3], t.shape[3] + 3).to(dtype)[..., 3:] for t in tensors]
    turned = [t.to(dtype).transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    shared = [t.to(dtype)[:1].expand(t.shape) for t in tensors]
    for views in (odd, turned, shared):
        there = [moved(v, device) for v in views]
        assert all(t.stride() == v.stride() for t, v in zip(there, views, strict=True))
        assert_same(_outputs(function, there), _outputs(function, [t.clone() for t in there]))


def test_rope_beyond_2_31_elements():
    needs_memory(12)
    tokens, heads = 2**20, 17
    q = torch.zeros(1, heads, tokens, 128, dtype=torch.bfloat16, device="cuda")
    assert q.numel() > 2**31
    q[:, -1, -5:] = torch.randn(5, 128)
    at, inv_freq = torch.arange(tokens, device="cuda"), frequencies(64)
    few = q[:, -1:, -5:].clone()
    expected, _ = ops.rope(few, few, at[-5:], inv_freq)
    ops.rope_(q, q[:, :0], at, inv_freq)
    assert torch.equal(q[:, -1:, -5:], expected)


@pytest.mark.parametrize("queries", [1, 40], ids=["few rows", "many rows"])
def test_attention_beyond_2_31_elements(queries):
    """All weight is on the last keys."""
    needs_memory(14)
    keys = 2**24 + 64
    k, v = (torch.zeros(1, 1, keys, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    assert k.numel() > 2**31
    k[:, :, -8:] = 16.0
    v[:, :, -8:] = torch.randn(128)
    q = torch.ones(1, 1, queries, 128, dtype=torch.bfloat16, device="cuda")
    out = ops.attention(q, k, v, causal=False)
    torch.testing.assert_close(out, v[:, :, -1:].expand_as(out))


def test_linear_nll_beyond_2_31_elements():
    needs_memory(10)
    vocab, embed = 2**19 + 100, 4096
    weight = torch.zeros(vocab, embed, dtype=torch.bfloat16, device="cuda")
    assert weight.numel() > 2**31
    weight[-1] = 2**-6
    hidden = torch.ones(3, embed, dtype=torch.bfloat16, device="cuda")
    targets = torch.tensor([vocab - 1, 0, -100], device="cuda")
    # The last logit is 64, all others 0.
    nll = ops.linear_nll(hidden, weight, targets)
    torch.testing.assert_close(nll.cpu(), torch.tensor([0.0, 64.0, 0.0]))
