"""How much goes through a model at once: the rows of a pass, and the tokens of each row."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from longrope.patching.attention import has_kernel_attention
from longrope.patching.settings import rope_settings, text_config
from longrope.patching.wrappers import device_of, dtype_of, language_model

#: Tokens of one forward pass on a CPU. Larger batches fall out of its caches: with the packaged
#: model and windows of 2048 tokens, 4096 were 2 to 6 % slower, 8192 another 2 to 13 %; chunks of
#: 1024 of longer windows were 7 % slower. On a GPU the batch is sized from the memory that is free.
CPU_TOKENS_PER_BATCH = 2048
#: Tokens of one forward pass on a GPU, for windows that go through it in chunks: more do not keep a
#: GPU any busier.
GPU_TOKENS_PER_CHUNK = 32768
#: The smallest chunk, in tokens: each chunk reads all earlier keys again.
LEAST_CHUNK = 256

#: Bytes kept for the backward pass, per layer and token, over the bytes of the residual stream:
#: the residual, norms, queries, keys and values before and after the rotation, the attention's
#: output, some of them in float32. Measured with the packaged model: 5 in float32, 7 in bfloat16.
_KEPT_OVER_HIDDEN = 8
#: The same over the bytes of the inner activation: gate, its activation, up and their product.
_KEPT_OVER_INNER = 4

#: The parts of a processor, in torch's names, that multiply in a dtype of 16 bits.
_UNITS = {torch.bfloat16: ("avx512_bf16", "amx_bf16"), torch.float16: ("amx_fp16",)}

#: Where Linux tells how much this process's control group may use (version 2, seen from inside).
CGROUP = Path("/sys/fs/cgroup")


class BatchPlan(NamedTuple):
    """The rows of one forward pass, and the tokens of each row in it (None: the whole window)."""

    rows: int
    chunk: int | None


class BackwardPlan(NamedTuple):
    """How one window goes forwards and backwards through a model.

    At most one of the two is set; else the activations of the whole window are kept.
    """

    #: Keep the input of each layer and compute the rest again in the backward pass.
    checkpointed_layers: bool = False
    #: Tokens of one pass, each computed again before its backward pass; None: the whole window.
    chunk: int | None = None


WHOLE_WINDOWS = BackwardPlan()


def plan_batches(
    model: nn.Module,
    length: int,
    windows: int | None = None,
    *,
    rows: int | None = None,
    cut: bool = True,
    name: str = "target_length",
) -> BatchPlan:
    """Choose the batches of forward passes without gradients from the memory that is free.

    On a CPU a pass gets as many tokens as its caches hold best. On a GPU windows stay whole where
    one fits into half of the free memory; else they go in chunks, which need memory besides that of
    the keys and values of all tokens.

    Parameters
    ----------
    model
        A language model on its device.
    length
        Tokens of a window.
    windows
        The number of windows altogether; None: any number.
    rows
        The rows of one pass, if the caller decides them; None: chosen here.
    cut
        Whether windows may go through the model in chunks.
    name
        The name of `length` in errors.

    Raises
    ------
    ValueError
        Where the keys and values of one window, or of the given rows, do not fit.
    """
    device = device_of(model)
    free = free_memory(device)
    cut = cut and has_kernel_attention(model)
    if device.type == "cuda":
        tokens = max(1, int(free * 0.5 / _bytes_per_token(model)))
    else:
        tokens = CPU_TOKENS_PER_BATCH
    if length * (rows or 1) <= tokens or not cut:
        fitting = rows or max(1, tokens // length)
        return BatchPlan(fitting if windows is None else min(fitting, windows), None)
    fitting = rows or 1
    cache = fitting * cache_bytes(model, length)
    if device.type == "cuda":
        # A tenth stays for fragments.
        tokens = min(int((free * 0.9 - cache) / _bytes_per_token(model)), GPU_TOKENS_PER_CHUNK)
    least = forward_bytes(model, length, BatchPlan(fitting, min(LEAST_CHUNK, length)))
    expected = f"{name}: expected windows whose keys and values"
    _expect_room(free, least, expected, f"{fitting} of {length}")
    return BatchPlan(fitting, min(length, max(LEAST_CHUNK, _power_of_two(tokens // fitting))))


def plan_backward(
    model: nn.Module, length: int, activation_checkpointing: bool | None = None
) -> BackwardPlan:
    """Choose how windows go forwards and backwards through a model, from the memory that is free.

    Parameters
    ----------
    model
        A language model on its device.
    length
        Tokens of a window.
    activation_checkpointing
        Whether activations are computed again in the backward pass; None: if those of a window
        would take more than half of the free memory. Chunks need `ops.attention` in the layers; a
        model with an attention of its own gets checkpointed layers.

    Raises
    ------
    ValueError
        Where the keys and values of a window, and their gradients, do not fit.
    """
    device = device_of(model)
    free = free_memory(device)
    kept = kept_per_token(model)
    if activation_checkpointing is None:
        activation_checkpointing = free is not None and length * kept > free / 2
    if not activation_checkpointing:
        return WHOLE_WINDOWS
    if not has_kernel_attention(model):
        return BackwardPlan(checkpointed_layers=True)
    # A sixteenth of a short window, so that the activations are not what counts.
    most = GPU_TOKENS_PER_CHUNK if device.type == "cuda" else CPU_TOKENS_PER_BATCH
    tokens = min(max(LEAST_CHUNK, _power_of_two(length // 16)), most)
    if free is not None:
        cache = 2 * cache_bytes(model, length, sliding=False)
        least = backward_bytes(model, length, BackwardPlan(chunk=min(LEAST_CHUNK, length)))
        expected = "target_length: expected windows whose keys, values and their gradients"
        _expect_room(free, least, expected, str(length))
        tokens = min(tokens, max(LEAST_CHUNK, _power_of_two(int((free - cache) / 2 / kept))))
    return BackwardPlan(chunk=tokens) if tokens < length else WHOLE_WINDOWS


def _expect_room(free: int | None, needed: int, expected: str, got: str) -> None:
    """Raise `ValueError` where more bytes are needed than are free (None: unknown)."""
    if free is not None and needed > free:
        raise ValueError(
            f"{expected} fit the free memory, got {got} tokens, which need {needed} bytes where "
            f"{free} are free"
        )


def forward_bytes(model: nn.Module, length: int, plan: BatchPlan) -> int:
    """Return what a planned pass over windows of `length` tokens takes, without gradients."""
    if plan.chunk is None:
        return plan.rows * length * _bytes_per_token(model)
    return plan.rows * (cache_bytes(model, length) + plan.chunk * _bytes_per_token(model))


def backward_bytes(model: nn.Module, length: int, plan: BackwardPlan) -> int:
    """Return what a window of `length` tokens takes on its way forwards and backwards."""
    if plan.chunk is None:
        return length * kept_per_token(model, recompute=plan.checkpointed_layers)
    cache = 2 * cache_bytes(model, length, sliding=False)
    return cache + plan.chunk * kept_per_token(model)


def cache_bytes(model: nn.Module, length: int, sliding: bool = True) -> int:
    """Return the bytes of the keys and values of one row of `length` tokens, in all layers.

    Layers with a sliding window hold no more than the window, unless `sliding` is False.
    """
    config = text_config(model)
    layers = config.num_hidden_layers
    window = getattr(config, "sliding_window", None) if sliding else None
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        kinds = ["sliding_attention" if window else "full_attention"] * layers
    held = {"sliding_attention": min(length, window)} if window else {}
    tokens = sum(held.get(kind, length) for kind in kinds)
    head_dim = rope_settings(config).head_dim
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    per_token = 2 * heads * head_dim * dtype_of(model).itemsize
    return tokens * per_token


def free_memory(device: torch.device) -> int | None:
    """Return the free bytes of a GPU, or of this machine where it tells (Linux); else None.

    On a machine this is what the process's control group leaves (containers, batch systems),
    divided by the number of ranks that torchrun runs there.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + held
    try:
        lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no limit reads "max"
        most, used = (int((CGROUP / f"memory.{name}").read_text()) for name in ("max", "current"))
        free = min(free, max(0, most - used + _reclaimable()))
    return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def _reclaimable() -> int:
    """Return the bytes of files that a control group counts as used, and frees when asked."""
    try:
        lines = (CGROUP / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines)["inactive_file"])
    except (OSError, ValueError, KeyError):
        return 0


def _bytes_per_token(model: nn.Module) -> int:
    """Return the bytes alive for each token at the widest point of a layer."""
    config = getattr(language_model(model), "config", None)
    hidden = getattr(config, "hidden_size", None) or 4096
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    # The residual, its norm (float32 inside), q, k, v and the output (6 x hidden with the float32
    # copy), and gate, up and their product.
    return dtype_of(model).itemsize * (8 * hidden + 3 * inner)


def kept_per_token(
    model: nn.Module, dtype: torch.dtype | None = None, recompute: bool = False
) -> int:
    """Return the bytes that a backward pass through all layers finds kept for each token.

    Computed in `dtype`; None: the model's own. `recompute`: the input of each layer, and what one
    layer computes again.
    """
    config = text_config(model)
    hidden = config.hidden_size
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    per_layer = _KEPT_OVER_HIDDEN * hidden + _KEPT_OVER_INNER * inner
    layers = config.num_hidden_layers
    elements = layers * hidden + per_layer if recompute else layers * per_layer
    return elements * (dtype or dtype_of(model)).itemsize


def _power_of_two(tokens: int) -> int:
    """Return the largest power of two up to `tokens`, at least 1."""
    return 1 << max(0, max(0, tokens).bit_length() - 1)


def processor_multiplies(dtype: torch.dtype) -> bool:
    """Return whether this processor has products of a dtype of 16 bits."""
    has = torch.cpu.get_capabilities()
    return any(has.get(unit) for unit in _UNITS[dtype])


def compute_dtype(model: nn.Module) -> torch.dtype:
    """Return the dtype in which a processor computes a model of 16 bits fastest, and loses nothing.

    Its own where the processor multiplies in it: bfloat16 with AVX512-BF16 or AMX is twice as fast
    as float32 (measured on an AMD EPYC of Zen 4). Elsewhere every product widens its factors anew,
    and float32 is faster: docs/benchmarks.md has figures of AVX2 alone. Float32 holds all values
    of both, so results are comparable: they differ by the rounding of activations alone. Where
    float32 weights would take more than half of the free memory, the model stays as it is.
    """
    dtype = dtype_of(model)
    if dtype not in _UNITS or processor_multiplies(dtype):
        return dtype
    narrow = (p for p in model.parameters() if p.is_floating_point() and p.itemsize == 2)
    free = free_memory(torch.device("cpu"))
    fits = free is None or 2 * sum(p.numel() for p in narrow) <= free / 2
    return torch.float32 if fits else dtype
