"""What a `LongRoPEModel` can be made of, and what it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from longrope import _validation
from longrope.checkpoints.hf import with_rope
from longrope.patching.attention import LARGEST_HEAD_DIM
from longrope.patching.rotation import DEVICES_WITH_KERNELS

if TYPE_CHECKING:
    from transformers import LlamaConfig

#: A label that is not scored, as in `ops.linear_nll` and transformers.
IGNORED = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def llama_config(
    d_model: int, n_heads: int, num_layers: int, base_length: int, vocab_size: int,
    n_kv_heads: int | None, d_ff: int | None, theta: float,
) -> LlamaConfig:  # fmt: skip
    """Return the configuration of the weights; arguments are those of `LongRoPEModel`."""
    from transformers import LlamaConfig

    sizes = {"d_model": d_model, "n_heads": n_heads, "num_layers": num_layers}
    sizes |= {"base_length": base_length, "vocab_size": vocab_size}
    sizes = {name: _validation.count(name, size) for name, size in sizes.items()}
    d_model, n_heads = sizes["d_model"], sizes["n_heads"]
    n_kv_heads = n_heads if n_kv_heads is None else _validation.count("n_kv_heads", n_kv_heads)
    d_ff = 64 * -(-8 * d_model // 192) if d_ff is None else _validation.count("d_ff", d_ff)
    theta = _validation.positive("theta", theta, above=1)
    head_dim, rest = divmod(d_model, n_heads)
    if rest or head_dim % 2 or head_dim > LARGEST_HEAD_DIM:
        raise ValueError(
            "n_heads: expected a number that divides d_model into heads of an even number of "
            f"channels, at most {LARGEST_HEAD_DIM}, got {n_heads} for d_model {d_model}"
        )
    if n_heads % n_kv_heads:
        raise ValueError(f"n_kv_heads: expected a divisor of n_heads, {n_heads}, got {n_kv_heads}")
    config = {
        "model_type": "llama", "hidden_size": sizes["d_model"], "intermediate_size": d_ff,
        "num_hidden_layers": sizes["num_layers"], "num_attention_heads": sizes["n_heads"],
        "num_key_value_heads": n_kv_heads, "head_dim": head_dim, "vocab_size": sizes["vocab_size"],
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": theta}
    return LlamaConfig.from_dict(with_rope(config, rope, sizes["base_length"], None))


def dtype(value: Any) -> None:
    """Refuse a type of weights that the kernels do not take."""
    if value not in DTYPES:
        known = ", ".join(str(one).removeprefix("torch.") for one in DTYPES)
        raise ValueError(f"dtype: expected a torch dtype of {known}, got {value!r}")


def device(found: torch.device) -> None:
    """Refuse weights where the kernels do not run."""
    if found.type not in DEVICES_WITH_KERNELS:
        raise ValueError(
            f"device: expected weights on {' or '.join(DEVICES_WITH_KERNELS)}, where this build "
            f"has kernels, got {found}"
        )


def visible_device(value: Any) -> None:
    """Refuse a device that torch does not know or does not see."""
    try:
        torch.empty(0, device=value)
    except (RuntimeError, AssertionError, TypeError):  # without CUDA torch asserts
        raise ValueError(f"device: expected one that torch sees, got {value!r}") from None


def inputs(inputs: Any, labels: Any, config: Any) -> None:
    """Refuse inputs and labels that the model cannot take."""
    expected = f"token ids [B, N] or embeddings [B, N, {config.hidden_size}], B and N at least 1"
    if not isinstance(inputs, Tensor):
        raise ValueError(f"inputs: expected {expected}, got {type(inputs).__name__}")
    integer = not (inputs.is_floating_point() or inputs.is_complex() or inputs.dtype == torch.bool)
    fits = inputs.dim() == 2 if integer else inputs.dim() == 3
    if not integer:
        fits = fits and inputs.is_floating_point() and inputs.shape[2] == config.hidden_size
    if not fits or not inputs.numel():
        raise ValueError(f"inputs: expected {expected}, got {_shown(inputs)}")
    if integer:
        _check_ids("inputs", inputs, config.vocab_size)
    if labels is None:
        return
    shape = list(inputs.shape[:2])
    if not isinstance(labels, Tensor) or labels.dtype != torch.int64 or list(labels.shape) != shape:
        shown = _shown(labels) if isinstance(labels, Tensor) else type(labels).__name__
        raise ValueError(f"labels: expected int64 {shape}, got {shown}")
    _check_ids("labels", labels, config.vocab_size, ignored=IGNORED)


def prompt(ids: Any, config: Any) -> None:
    """Refuse what is no prompt of token ids `[B, N]`."""
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.is_floating_point() or not ids.numel():
        shown = _shown(ids) if isinstance(ids, Tensor) else type(ids).__name__
        raise ValueError(f"input_ids: expected token ids [B, N], B and N at least 1, got {shown}")
    _check_ids("input_ids", ids, config.vocab_size)


def _check_ids(name: str, ids: Tensor, vocab_size: int, ignored: int | None = None) -> None:
    if ignored is not None:
        ids = ids.masked_fill(ids == ignored, 0)
    if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):
        ids = ids.long()  # torch has no comparisons of these
    low, high = (int(edge) for edge in torch.aminmax(ids))
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"{name}: expected token ids below {vocab_size}, got {wrong}")


def _shown(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"
