"""What goes through a model at once: rows and chunks by the memory that is free."""

from __future__ import annotations

import pytest
import torch
from support import families
from support.tiny_models import build, tokens

from longrope.evaluation import memory
from longrope.evaluation.memory import (
    CPU_TOKENS_PER_BATCH,
    WHOLE_WINDOWS,
    BackwardPlan,
    BatchPlan,
    backward_bytes,
    cache_bytes,
    forward_bytes,
    kept_per_token,
    plan_backward,
    plan_batches,
)
from longrope.patching.attention import kernel_attention
from longrope.patching.window_cache import differentiable_cache, window_cache

pytestmark = pytest.mark.usefixtures("one_thread")

#: Bytes of a token in the models of `build`: (8 x 64 + 3 x 96) float32.
ACTIVATIONS = 3200
#: 2 layers, keys and values, 2 heads of 16 float32.
KEYS_AND_VALUES = 512
#: 2 layers of (8 x 64 + 4 x 96) float32.
KEPT = 7168


@pytest.fixture
def gpu(monkeypatch):
    """Plan as on a GPU of so many free bytes."""

    def with_free(free):
        monkeypatch.setattr(memory, "device_of", lambda model: torch.device("cuda"))
        monkeypatch.setattr(memory, "free_memory", lambda device: free)

    return with_free


def test_on_a_cpu_a_pass_gets_what_its_caches_hold(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1 << 40)
    model, most = build(), CPU_TOKENS_PER_BATCH
    assert plan_batches(model, most // 4) == BatchPlan(4, None)
    assert plan_batches(model, most // 4, 3) == BatchPlan(3, None)
    assert plan_batches(model, most) == BatchPlan(1, None)
    assert plan_batches(model, 10 * most) == BatchPlan(1, most)
    assert plan_batches(model, 10 * most, cut=False) == BatchPlan(1, None)
    assert plan_batches(model, most, rows=2) == BatchPlan(2, most // 2)
    assert plan_batches(model, 10 * most, rows=64) == BatchPlan(64, memory.LEAST_CHUNK)


def test_on_a_gpu_whole_windows_where_half_of_the_memory_holds_one(gpu):
    model = build()
    gpu(2 * ACTIVATIONS * 8192)
    assert plan_batches(model, 1024) == BatchPlan(8, None)
    assert plan_batches(model, 8192) == BatchPlan(1, None)
    assert plan_batches(model, 1024, rows=3) == BatchPlan(3, None)
    assert plan_batches(model, 8193, cut=False) == BatchPlan(1, None)


def test_on_a_gpu_chunks_beside_the_cache(gpu):
    model, length = build(), 1 << 20
    cache = KEYS_AND_VALUES * length
    gpu(int((cache + 5000 * ACTIVATIONS) / 0.9))
    assert plan_batches(model, length) == BatchPlan(1, 4096)
    gpu(1 << 40)
    assert plan_batches(model, 1 << 29) == BatchPlan(1, memory.GPU_TOKENS_PER_CHUNK)
    gpu(int((2 * cache + 5000 * ACTIVATIONS) / 0.9))
    assert plan_batches(model, length, rows=2) == BatchPlan(2, 2048)


def test_a_window_whose_cache_does_not_fit_is_one_sentence(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 1_000_000)
    needed = KEYS_AND_VALUES * 8192 + memory.LEAST_CHUNK * ACTIVATIONS
    with pytest.raises(
        ValueError,
        match=rf"target_length: .* got 1 of 8192 tokens, which need {needed} bytes where 1000000",
    ):
        plan_batches(build(), 8192)
    with pytest.raises(ValueError, match=r"^length: .* got 1 of 8192 tokens"):
        plan_batches(build(), 8192, name="length")
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    assert plan_batches(build(), 8192).chunk is not None
    with pytest.raises(ValueError, match=r"target_length: .* got 2 of 8192 tokens"):
        plan_batches(build(), 8192, rows=2)
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert plan_batches(build(), 8192).chunk is not None


def test_on_a_gpu_that_holds_little_beside_the_cache_chunks_are_least(gpu):
    length = 1 << 20
    gpu(KEYS_AND_VALUES * length + memory.LEAST_CHUNK * ACTIVATIONS)
    assert plan_batches(build(), length) == BatchPlan(1, memory.LEAST_CHUNK)


def test_free_memory_is_what_the_control_group_leaves_each_rank(tmp_path, monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert memory.free_memory(cpu) > 1 << 20
    (tmp_path / "memory.current").write_text("1000\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free_memory(cpu) > 1 << 20
    (tmp_path / "memory.max").write_text("9000\n")
    assert memory.free_memory(cpu) == 8000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert memory.free_memory(cpu) == 2000
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 300\n")
    assert memory.free_memory(cpu) == 2075
    (tmp_path / "memory.max").write_text("10\n")
    assert memory.free_memory(cpu) == 0


def test_a_backward_pass_is_cut_where_its_activations_take_half_of_the_memory(monkeypatch):
    model, most = build(), CPU_TOKENS_PER_BATCH
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 8192 * KEPT)
    assert plan_backward(model, 8192) == WHOLE_WINDOWS
    assert plan_backward(model, 8193) == BackwardPlan(chunk=512)
    assert plan_backward(model, 8193, False) == WHOLE_WINDOWS
    assert plan_backward(model, 2048, True) == BackwardPlan(chunk=memory.LEAST_CHUNK)
    assert plan_backward(model, memory.LEAST_CHUNK, True) == WHOLE_WINDOWS
    monkeypatch.setattr(memory, "free_memory", lambda device: None)
    assert plan_backward(model, 1 << 20) == WHOLE_WINDOWS
    assert plan_backward(model, 1 << 20, True) == BackwardPlan(chunk=most)


def test_a_backward_pass_is_cut_finer_beside_a_large_cache(gpu):
    model, length = build(), 1 << 20
    cache = 2 * KEYS_AND_VALUES * length
    gpu(cache + 2 * 5000 * KEPT)
    assert plan_backward(model, length) == BackwardPlan(chunk=4096)
    gpu(1 << 42)
    assert plan_backward(model, length, True) == BackwardPlan(chunk=memory.GPU_TOKENS_PER_CHUNK)


def test_a_backward_pass_that_does_not_fit_is_one_sentence(monkeypatch):
    needed = 2 * KEYS_AND_VALUES * 8192 + memory.LEAST_CHUNK * KEPT
    monkeypatch.setattr(memory, "free_memory", lambda device: needed - 1)
    with pytest.raises(ValueError, match=rf"target_length: .* 8192 tokens, which need {needed} "):
        plan_backward(build(), 8192)
    monkeypatch.setattr(memory, "free_memory", lambda device: needed)
    assert plan_backward(build(), 8192) == BackwardPlan(chunk=memory.LEAST_CHUNK)


def test_what_a_plan_takes():
    model, length, half = build(), 1000, torch.bfloat16
    cache = KEYS_AND_VALUES * length
    assert forward_bytes(model, length, BatchPlan(3, None)) == 3 * length * ACTIVATIONS
    assert forward_bytes(model, length, BatchPlan(3, 10)) == 3 * (cache + 10 * ACTIVATIONS)
    assert backward_bytes(model, length, WHOLE_WINDOWS) == length * KEPT
    assert backward_bytes(model, length, BackwardPlan(chunk=10)) == 2 * cache + 10 * KEPT
    layers = 2 * 64 * 4 + KEPT // 2  # the input of each, and what one computes again
    assert backward_bytes(model, length, BackwardPlan(checkpointed_layers=True)) == length * layers
    assert kept_per_token(model, half) == KEPT // 2
    assert kept_per_token(model.to(half), torch.float32) == KEPT
    assert kept_per_token(model, recompute=True) == layers // 2


def test_a_model_with_its_own_attention_gets_checkpointed_layers(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 2 * 8192 * KEPT)
    monkeypatch.setattr(memory, "has_kernel_attention", lambda model: False)
    assert plan_backward(build(), 8192) == WHOLE_WINDOWS
    assert plan_backward(build(), 8193) == BackwardPlan(checkpointed_layers=True)


@pytest.mark.parametrize(
    ("kind", "extra"),
    [
        ("llama", {}),
        ("mistral", {"sliding_window": 8}),
        ("qwen2", {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}),
    ],
)
def test_the_size_of_the_cache(kind, extra):
    model = build(kind, **extra)
    cache = window_cache(model, 40)
    with torch.inference_mode(), kernel_attention(model):
        model.model(tokens(1, 40), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    # The window's own token is not in transformers' sliding layers.
    sliding = sum(layer.is_sliding for layer in cache.layers)
    assert cache_bytes(model, 40) == held + sliding * KEYS_AND_VALUES // 2


def test_the_size_of_a_cache_that_gradients_flow_through():
    model = build("mistral", sliding_window=8)
    cache = differentiable_cache(model, 40)
    with torch.no_grad(), kernel_attention(model):
        model.model(tokens(1, 40), past_key_values=cache, use_cache=True)
    held = sum(t.numel() * 4 for layer in cache.layers for t in (layer.keys, layer.values))
    assert cache_bytes(model, 40, sliding=False) == held


def test_a_configuration_that_names_no_key_value_heads():
    """As GPT-NeoX's, which has as many as heads."""
    model = families.build("gpt_neox")
    del model.config.num_key_value_heads  # which that of a Pythia does not have
    config = model.config
    per_token = 2 * config.num_hidden_layers * config.hidden_size * 4
    assert cache_bytes(model, 40) == 40 * per_token
